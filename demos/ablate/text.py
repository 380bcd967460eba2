"""A text continued with and without some latents, as the Ablate tab shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saert.demos.pieces import PACE, ids_of, new_tokens, paced
from saert.demos.widgets import CHANGE_FULL, Token
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.ablation.ranking import token_at
from saert.measure.steering import EditSpec, Sampling, Setup, Step, side_by_side
from saert.measure.steering.compare import Token as Written
from saert.measure.steering.spec import short


@dataclass(frozen=True)
class Texts:
    """Both continuations so far."""

    default: list[Token]
    ablated: list[Token]


def specs(source: str, latents: Sequence[int], phase: str = "all") -> list[dict[str, Any]]:
    """Ablations as plain data (`EditSpec`). Raises TypeError, ValueError for what is none."""
    if not isinstance(latents, list | tuple):
        raise TypeError(f"latents: found {short(latents)}, expected a list of whole numbers")
    made = [EditSpec(source, latent, "ablate", phase=phase) for latent in latents]  # type: ignore[arg-type]
    return [one.to_dict() for one in made]


def continued(
    bench: Workbench,
    source: str,
    text: str,
    latents: Sequence[int],
    position: int = -1,
    phase: str = "all",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    every: float = PACE,
) -> Iterator[Texts]:
    """The text up to a token, continued with and without latents, from the same seed.

    It is the tokens that are continued, not their text, which may end within a character.
    """
    if not latents:
        raise UserError("no latent is chosen to ablate")
    edits = tuple(EditSpec.from_dict(one) for one in specs(source, latents, phase))
    sampling = Sampling(new_tokens(max_new_tokens), temperature, seed=seed)
    ids = ids_of(bench, text)
    ids = ids[:, : token_at(position, ids.shape[1]) + 1]
    setup = Setup(bench.session.name, "", edits=edits, sampling=sampling)
    saes = {edit.sae: bench.sae(source).sae for edit in edits}
    steps = side_by_side(
        bench.model(), bench.tokenizer, setup, saes, ids=ids, strict=bench.session.strict
    )
    yield from paced(_texts(steps), every)


def _texts(steps: Iterator[Step]) -> Iterator[Texts]:
    default: list[Token] = []
    ablated: list[Token] = []
    for step in steps:
        if step.default is not None:
            default.append(Token(text=step.default.text, title=f"p {_p(step.default.logprob)}"))
        if step.steered is not None:
            ablated.append(_changed(step.steered))
        yield Texts(list(default), list(ablated))


def joined(tokens: Sequence[Token]) -> str:
    """Tokens as text."""
    return "".join(token["text"] for token in tokens)


def _changed(one: Written) -> Token:
    """A token with the change of its log-probability as heat."""
    if one.change is None or one.kl is None:
        return Token(text=one.text)
    title = f"p {_p(one.logprob)}, as the model is {_p(one.default_logprob)}, KL {one.kl:.2g} nats"
    return Token(text=one.text, heat=max(-1.0, min(1.0, one.change / CHANGE_FULL)), title=title)


def _p(logprob: float | None) -> str:
    return "unknown" if logprob is None else f"{math.exp(logprob):.0%}"
