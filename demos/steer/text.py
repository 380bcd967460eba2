"""Two texts as they are written: tokens with heat, and the figures beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from saert.demos.pieces import said
from saert.demos.widgets import CHANGE_FULL, CHANGE_LEGEND, KL_FULL, KL_LEGEND, Figure, Token
from saert.measure.steering import Live, Step
from saert.measure.steering import Token as Written

CHANGE, KL, NONE = "log-probability", "KL", "none"
FULL = {CHANGE: CHANGE_FULL, KL: KL_FULL}  # nats
LEGENDS = {CHANGE: CHANGE_LEGEND, KL: KL_LEGEND, NONE: ()}


@dataclass
class Texts:
    """All of both texts so far.

    Attributes:
        prompt: the prompt's tokens, with what the edits change there.
        default, steered: the tokens after it.
    """

    prompt: list[Written] = field(default_factory=list)
    default: list[Written] = field(default_factory=list)
    steered: list[Written] = field(default_factory=list)
    live: Mapping[str, Live] = field(default_factory=dict)
    default_ms: float = 0.0
    steered_ms: float = 0.0

    def add(self, step: Step) -> None:
        """Take in one more step."""
        self.prompt.extend(step.prompt)
        if step.default is not None:
            self.default.append(step.default)
        if step.steered is not None:
            self.steered.append(step.steered)
        self.live = step.live
        self.default_ms, self.steered_ms = step.default_ms, step.steered_ms


def grown(steps: Iterator[Step]) -> Iterator[Texts]:
    """Both texts after each step: one object, which grows."""
    texts = Texts()
    for step in steps:
        texts.add(step)
        yield texts


def plain(texts: Texts) -> list[Token]:
    """The default text: the prompt, then what the model writes."""
    return [_prompt(one) for one in texts.prompt] + [Token(text=t.text) for t in texts.default]


def heated(texts: Texts, how: str) -> list[Token]:
    """The steered text, coloured by `how`; a token's title gives its numbers in any case."""
    return [
        _prompt(one) | _heat(one, how) for one in texts.prompt
    ] + [Token(text=one.text) | _heat(one, how) for one in texts.steered]  # fmt: skip


def figures(texts: Texts) -> list[Figure]:
    """KL, speed, and per SAE its L0, FVU and error norm; each note says over which tokens."""
    found: list[Figure] = []
    if spread := [one.kl for one in texts.steered if one.kl is not None]:
        found.append(
            Figure(name="mean KL, nats", value=f"{fmean(spread):.3f}",
                   note=f"steered from default, over {len(spread)} tokens written")
        )  # fmt: skip
    if texts.default_ms > 0:
        ratio = texts.steered_ms / texts.default_ms
        found += [
            Figure(name="ms per token, default", value=f"{texts.default_ms:.1f}",
                   note="median so far"),
            Figure(name="ms per token, steered", value=f"{texts.steered_ms:.1f} ({ratio:.2f}×)",
                   note="median so far, and times the default"),
        ]  # fmt: skip
    for source, live in texts.live.items():
        place = f" · {source.rpartition(':')[2]}"
        over = f"over {live.tokens} tokens, of the prompt and written"
        found += [
            Figure(name=f"L0{place}", value=said(live.l0, ".1f"),
                   note=f"latents that fire per token, {over}"),
            Figure(name=f"FVU{place}", value=said(live.fvu, ".3f"),
                   note=f"variance left unexplained, {over}"),
            Figure(name=f"error norm{place}", value=said(live.error_norm, ".2f"),
                   note=f"mean length of what is left unexplained, {over}"),
        ]  # fmt: skip
    return found


def _prompt(one: Written) -> Token:
    return Token(text=one.text, muted=True)


def _heat(one: Written, how: str) -> Token:
    if one.logprob is None or one.default_logprob is None or one.kl is None:
        return Token()
    title = (
        f"log-probability {one.logprob:.2f} steered, {one.default_logprob:.2f} default "
        f"(change {one.logprob - one.default_logprob:+.2f}); KL {one.kl:.3f} nats"
    )
    if how == NONE:
        return Token(title=title)
    value = one.logprob - one.default_logprob if how == CHANGE else one.kl
    return Token(title=title, heat=max(-1.0, min(1.0, value / FULL[how])))
