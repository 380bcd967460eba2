"""What the app shows of one latent: its card, in parts that need more and more work."""

from __future__ import annotations

from html import escape
from typing import Any

from saert.demos.explore.looking import Looked
from saert.demos.markup import heat, histogram, logits
from saert.demos.widgets import Bar, Figure
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure import ablation_effects, explain, neutral_token
from saert.measure.features import Card, Direction, Example, Selection, direction, specials
from saert.measure.features.vocabulary import vocabulary
from saert.measure.steering import EditSpec

SHOWN = Selection(top=8, quantiles=5, per_quantile=3, before=16, after=8, bins=40)
HORIZON = 16  # tokens behind an ablation
ASSUMED = 10.0  # to steer with, where no activation is known
SIDES = "display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0 24px"
Pairs = list[tuple[str, float]]


def known(bench: Workbench, source: str, latent: int) -> Card | None:
    """A latent's card, once examples have been gathered. ValueError if there is no such latent."""
    index = bench.index(source)
    return None if index is None else index.card(latent, SHOWN)


def written(bench: Workbench, source: str, latent: int) -> Direction:
    """What a latent promotes, suppresses and lies near, for which nothing need be gathered."""
    return direction(bench.model(), bench.tokenizer, bench.sae(source).sae, latent, logits=10)


def title(bench: Workbench, source: str, latent: int | None) -> str:
    """The heading of a card; who named the latent."""
    if latent is None:
        return note("Choose one of the latents that fire here, or a token and then a latent of it.")
    given = bench.sae(source).label(latent)
    name = given or bench.label(source, latent)
    how = "" if given or not name else " <small>named after its strongest tokens</small>"
    return f"<h3>#{latent} {escape(name)}{how}</h3>"


def figures(card: Card) -> list[Figure]:
    """The numbers of a card."""
    return [
        {"name": "density", "value": f"{card.density:.2%}", "note": f"of tokens: {card.count:,}"},
        {"name": "mean", "value": f"{card.mean:.2f}", "note": "where it fires"},
        {"name": "maximum", "value": f"{card.largest:.2f}", "note": "in the text gathered"},
    ]


def activations(card: Card) -> str:
    """The histogram; for a dead latent, that it is one."""
    if not card.count:
        return note("This latent is dead: it never fires in the text gathered.")
    return histogram(card.heights.tolist(), 0.0, card.largest, "activation")


def lens(found: Direction) -> str:
    """Promoted and suppressed tokens, or why there are none."""
    if found.undefined:
        return note(f"Which logits it moves is not defined: {found.undefined}.")
    sides = (("Promotes", found.promoted), ("Suppresses", found.suppressed))
    return _sides([(name, [(one.string, one.value) for one in side]) for name, side in sides])


def near(bench: Workbench, source: str, found: Direction) -> list[Bar]:
    """The nearest decoder directions, to choose."""
    return [
        {
            "name": f"#{latent}",
            "label": bench.label(source, latent),
            "value": f"cosine {cosine:.2f}",
            "share": cosine,
        }
        for latent, cosine in found.neighbours
    ]


def examples(card: Card) -> str:
    """The strongest examples, and some of each band of activations."""
    if not card.count:
        return ""
    parts = ["<h4>Strongest examples</h4>", *(_line(one, card.largest) for one in card.top)]
    parts.append("<h4>Examples by activation</h4>")
    bands = [band for band in card.bands if band.examples]
    for at, band in enumerate(bands):
        opened = " open" if at == 0 else ""  # or nobody would know what is in them
        span = f"{band.low:.2f} to {band.high:.2f}"
        lines = "".join(_line(one, card.largest) for one in band.examples)
        parts.append(
            f"<details{opened}><summary>{span} <small>{band.count:,} tokens</small></summary>"
            f"{lines}</details>"
        )
    return "".join(parts)


def effect(bench: Workbench, one: Looked | None, latent: int, token: int | None = None) -> str:
    """What ablating a latent changes in the text looked at, at one token and after it.

    At `token` if it fires there, else where it is strongest.
    """
    if one is None:
        return ""
    values = one.look.of(latent).abs()
    if not values.any():
        return note("It does not fire in this text: nothing to ablate.")
    at = token if token is not None and values[token] else int(values.argmax())
    found = ablation_effects(
        bench.model(), bench.sae(one.source).sae, one.look.ids[None], latents=[latent],
        positions=[at], horizon=HORIZON, top=6, special=specials(bench.tokenizer),
        strict=bench.session.strict, progress=False,
    )  # fmt: skip
    if not len(found):
        return note("Ablating it changes nothing that can be measured here.")
    kl = [value for value in found.kl_by_token[0].tolist() if value == value]
    strings = one.strings[at : at + len(kl)]
    said = escape(one.strings[at])
    parts = [
        "<h4>Ablated in this text</h4>",
        f"<p>Taken away at “{said}”, where it is {float(found.values[0]):.2f}, it changes what the "
        f"model predicts after each of these tokens (KL in nats, at most {max(kl):.3g}):</p>",
        heat(strings, kl, max(kl) or 1.0, 0),
    ]
    for name, ids in (("promotes", found.top_promoted), ("suppresses", found.top_suppressed)):
        tokens = ", ".join(
            f"<code>{escape(token)}</code>"
            for token in vocabulary(bench.tokenizer, ids[0].tolist())
        )
        parts.append(f"<p>Here it {name} {tokens}.</p>")
    return "".join(parts)


def explanation(bench: Workbench, source: str, latent: int, rows: Any) -> str:
    """The patterns of tokens that predict a latent (N2G), and how well they do."""
    found = explain(
        bench.model(), bench.sae(source).sae, rows, [latent],
        pad_token=neutral_token(bench.tokenizer), special=specials(bench.tokenizer), progress=False,
    )[0]  # fmt: skip
    lines = found.lines(bench.tokenizer)
    if not lines:
        return note("It never fires in the text gathered: nothing to explain.")
    items = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines[:8])
    more = f"<p>and {len(lines) - 8} more</p>" if len(lines) > 8 else ""
    return (
        "<h4>Explanation</h4><p>It fires after these patterns (N2G), each with the activation it "
        f"stands for. They predict {found.recall:.0%} of its activations, and "
        f"{found.precision:.0%} of what they predict is "
        f"right.</p><ol class='saert-patterns'>{items}</ol>{more}"
    )


def steer_with(bench: Workbench, source: str, latent: int) -> dict[str, Any]:
    """An edit that adds a latent at its largest known activation, as plain data."""
    amount = float(f"{bench.largest(source, latent) or ASSUMED:.3g}")
    return dict(EditSpec(bench.sae(source).source, latent, "add", amount).to_dict())


def plain(bench: Workbench, source: str, latent: int) -> dict[str, Any]:
    """A card as JSON; waits for the examples."""
    loaded = bench.sae(source)
    card = bench.wait_index(source).card(latent, SHOWN).as_dict()
    return card | {"source": loaded.source, "label": bench.label(source, latent)}


def number(text: str, size: int) -> int | None:
    """The latent that a search names by number; None for other text, UserError if out of range."""
    digits = text.strip().removeprefix("#")
    if not (digits.isascii() and digits.isdigit()):
        return None
    if len(digits) > 18 or int(digits) >= size:
        raise UserError(f"latent {digits[:18]}: this SAE has 0 to {size - 1}")
    return int(digits)


def note(text: str) -> str:
    """A line that says why there is nothing to show."""
    return f"<p class='saert-note'>{escape(text)}</p>"


def _sides(sides: list[tuple[str, Pairs]]) -> str:
    columns = "".join(f"<div><h4>{name}</h4>{logits(pairs)}</div>" for name, pairs in sides)
    return f"<div class='saert-sides' style='{SIDES}'>{columns}</div>"


def _line(one: Example, largest: float) -> str:
    strings = one.strings or tuple(f" {token}" for token in one.tokens)
    return heat(strings, one.activations, largest, one.peak)
