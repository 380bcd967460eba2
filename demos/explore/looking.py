"""A text with what an SAE's latents do in it, as data for widgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saert.demos.pieces import chosen_of, ids_of
from saert.demos.widgets import Bar, Token
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.features import FeatureIndex, Look, look, specials
from saert.measure.features.vocabulary import vocabulary


@dataclass(frozen=True, eq=False)
class Looked:
    """What a visitor looks at: a text through the SAE `source`."""

    source: str
    strings: list[str]
    look: Look


def looked(bench: Workbench, text: str, source: str) -> Looked:
    """A text through an SAE. Raises what `ids_of` and `bench.sae` raise."""
    ids = ids_of(bench, text)[0]
    loaded = bench.sae(source)
    found = look(bench.model(), loaded.sae, ids, specials(bench.tokenizer))
    return Looked(loaded.source, vocabulary(bench.tokenizer, ids.tolist()), found)


def heat(
    bench: Workbench, one: Looked, latent: int | None = None, token: int | None = None
) -> list[Token]:
    """The tokens, coloured by a latent as a part of its maximum, or by all latents together."""
    if latent is None:
        totals = one.look.totals
        values = totals - totals[one.look.used].min() if one.look.used.any() else totals
        most = float(values.max())  # from the least to the most, or all tokens would look alike
        said = [
            f"{n} active latents, {v:.1f} in all"
            for n, v in zip(one.look.l0.tolist(), totals.tolist(), strict=True)
        ]
    else:
        values = one.look.of(latent)
        most = max(bench.largest(one.source, latent) or 0.0, float(values.abs().max()))
        said = [f"#{latent}: {v:.2f}" for v in values.tolist()]
    return [
        {
            "text": string,
            "heat": float(v) / (most or 1.0) if used else None,
            "title": what if used else "a special token, left out",
            "selected": i == token,
        }
        for i, (string, v, what, used) in enumerate(
            zip(one.strings, values, said, one.look.used.tolist(), strict=True)
        )
    ]


def at_token(bench: Workbench, one: Looked, token: int) -> list[Bar]:
    """The latents active at a token, the strongest first, and how near each is to its maximum."""
    active = one.look.at(token)
    longest = max((abs(value) for _, value in active), default=1.0)
    return [
        bar(
            bench,
            one.source,
            latent,
            f"{value:.2f}{_part(bench, one.source, latent, value)}",
            value / longest,
        )
        for latent, value in active
    ]


def firing(bench: Workbench, one: Looked, index: FeatureIndex, most: int = 20) -> list[Bar]:
    """The latents that say most about the whole text (`FeatureIndex.rank`)."""
    ranked = index.rank(one.look.code, most)
    best = max((found.score for found in ranked), default=1.0)
    return [
        bar(
            bench, one.source, found.latent,
            f"{found.activation:.2f}{_part(bench, one.source, found.latent, found.activation)}",
            found.score / best,
        )
        for found in ranked
    ]  # fmt: skip


def bar(bench: Workbench, source: str, latent: int, value: str, share: float) -> Bar:
    """A latent to choose."""
    return {
        "name": f"#{latent}",
        "label": bench.label(source, latent),
        "value": value,
        "share": share,
    }


def hits(bench: Workbench, source: str, text: str) -> list[Bar]:
    """What a search finds. UserError if that is nothing."""
    found = bench.search(source, text)
    if not found:
        more = "" if bench.index(source) else "; examples are still being gathered, try again"
        raise UserError(f"no latent found for “{text.strip()}”{more}")
    return [
        {"name": f"#{hit.latent}", "label": hit.label, "value": hit.why, "share": 0.0}
        for hit in found
    ]


def chosen(bars: list[Bar] | None, event: Any) -> int:
    """Which latent was chosen of a list."""
    listed = bars or []
    return int(listed[chosen_of(event, len(listed))]["name"].lstrip("#"))


def _part(bench: Workbench, source: str, latent: int, value: float) -> str:
    largest = bench.largest(source, latent)
    return f" · {value / largest:.0%} of max" if largest else ""
