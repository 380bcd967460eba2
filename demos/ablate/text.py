"""A text continued with and without some latents, as the Ablate tab shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saert.demos.pieces import ids_of, place
from saert.demos.widgets import Token
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.steering import EditSpec, Sampling, Setup, side_by_side
from saert.measure.steering.compare import Token as Written

FULL = 4.0  # nats of change with full colour


@dataclass(frozen=True)
class Texts:
    """Both continuations so far."""

    default: list[Token]
    ablated: list[Token]


def specs(source: str, latents: Sequence[int], phase: str = "all") -> list[dict[str, Any]]:
    """Ablations as plain data (`EditSpec`). Raises ValueError for what is none."""
    made = [EditSpec(source, int(latent), "ablate", phase=phase) for latent in latents]  # type: ignore[arg-type]
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
) -> Iterator[Texts]:
    """The text up to a token, continued with and without latents, from the same seed."""
    if not latents:
        raise UserError("no latent is chosen to ablate")
    sae, ids = bench.sae(source).sae, ids_of(bench, text)
    at = place(position, ids.shape[1])
    if at < ids.shape[1] - 1:
        text = bench.tokenizer.decode(ids[0, : at + 1], skip_special_tokens=True)
    edits = tuple(EditSpec.from_dict(one) for one in specs(source, latents, phase))
    sampling = Sampling(max_new_tokens=int(max_new_tokens), temperature=temperature, seed=int(seed))
    setup = Setup(bench.session.name, text, edits=edits, sampling=sampling)
    default: list[Token] = []
    ablated: list[Token] = []
    for step in side_by_side(
        bench.model(), bench.tokenizer, setup, {source: sae}, strict=bench.session.strict
    ):
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
    return Token(text=one.text, heat=max(-1.0, min(1.0, one.change / FULL)), title=title)


def _p(logprob: float | None) -> str:
    return "unknown" if logprob is None else f"{math.exp(logprob):.0%}"
