"""The rows of the Steer tab: a latent each, with what to do to it, how strongly and when.

`Shared.edits` is what counts. A row that a person changes writes to it; what anyone else writes
there (a preset, a link, another tab) is drawn. `drawn` remembers what the rows show, so a row is
never drawn over the hand that is moving it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from saert.demos.errors import shown, warn
from saert.demos.gather import Hit
from saert.demos.steer import strength
from saert.demos.steer.hold import hold, landed
from saert.demos.steer.setup import Edits, exists
from saert.demos.workbench import Workbench
from saert.hub.session import Loaded, UserError
from saert.measure.steering import EditSpec

ROWS = 8
LISTED = 2000  # labels in the list; a search finds the others
TICKS = (  # of the slider, in strongest activations, or for a factor in factors
    "<div class='steer-ticks' aria-hidden='true'><span>−10×</span><span>−1×</span><span>0</span>"
    "<span>1×</span><span>10×</span></div>"
)
NUMBER = re.compile(r"#?(-?[0-9]+)(?= |$)")
OPS = [("add", "add"), ("set to", "clamp"), ("multiply", "scale"), ("ablate", "ablate")]
ONE_AT_A_TIME: dict[str, Any] = {
    "concurrency_id": "steer-rows", "concurrency_limit": 1, "show_progress": "hidden",
    "api_visibility": "private",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The components of one row."""

    box: gr.Group
    title: gr.HTML
    op: gr.Radio
    slider: gr.Slider
    ticks: gr.HTML
    amount: gr.Number
    when: gr.Number
    above: gr.Number
    remove: gr.Button

    @property
    def drawn(self) -> list[Any]:
        """What `draw` writes."""
        return [self.box, self.title, self.op, self.slider, self.ticks, self.amount,
                self.when, self.above]  # fmt: skip


def lay(place: int) -> Row:
    """One row, not shown yet."""
    name = f"steer-{place}"
    with gr.Group(visible=False, elem_classes=["steer-row"]) as box:
        with gr.Row(elem_classes=["steer-row-head"]):
            title = gr.HTML(elem_id=f"{name}-title", padding=False)
            remove = gr.Button("Remove", size="sm", elem_id=f"{name}-remove", min_width=80, scale=0)
        op = gr.Radio(
            OPS, value="add", label="What to do", show_label=False, elem_id=f"{name}-op"
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=3, min_width=180, elem_classes=["steer-strength"]):
                slider = gr.Slider(
                    -100, 100, 50, step=1, label="Strength", elem_id=f"{name}-slider",
                    elem_classes=["strength"], buttons=[],
                )  # fmt: skip
                ticks = gr.HTML(TICKS, padding=False)
            amount = gr.Number(
                label="Exactly", elem_id=f"{name}-amount", scale=1, min_width=90, step=0.1
            )
        with gr.Row():
            when = gr.Number(
                None, label="Only where latent", placeholder="always", precision=0,
                elem_id=f"{name}-when", scale=1, min_width=120,
                info="a number, of the same SAE; empty: at every token",
            )  # fmt: skip
            above = gr.Number(
                0.0, label="Exceeds", elem_id=f"{name}-above", scale=1, min_width=120, step=0.5,
                info="steered only where its activation is larger",
            )  # fmt: skip
    return Row(box, title, op, slider, ticks, amount, when, above, remove)


def connect(
    bench: Workbench, rows: list[Row], edits: gr.State, prompt: gr.Textbox, start: gr.State
) -> None:
    """Rows to edits and edits to rows. While what is set is the `start`, others replace it."""
    drawn = gr.State([])
    everything = [part for row in rows for part in row.drawn]
    landed(edits.change(
        shown(lambda now, before, *more: draw(bench, now, before, *more)),
        [edits, drawn, start, prompt], [edits, drawn, *everything],
        js=hold("rows"), **ONE_AT_A_TIME,
    ), "rows")  # fmt: skip
    for place, row in enumerate(rows):
        both = [edits, drawn]
        latest: dict[str, Any] = {"trigger_mode": "always_last", **ONE_AT_A_TIME}
        row.slider.input(None, row.slider, row.amount, js=strength.amount_js(place))
        landed(row.slider.input(
            _put(place, "amount"), [edits, row.amount, row.slider], both,
            js=held(f"slider-{place}", strength.moved_js(place)), **latest,
        ), f"slider-{place}")  # fmt: skip
        row.amount.input(None, row.amount, row.slider, js=strength.position_js(place))
        for field, part in (("amount", row.amount), ("when", row.when), ("above", row.above)):
            landed(
                part.input(
                    _put(place, field), [edits, part], both, js=hold(f"{field}-{place}"), **latest
                ),
                f"{field}-{place}",
            )
        landed(row.op.input(
            shown(lambda now, op, text, at=place: changed(bench, now, at, op, text)),
            [edits, row.op, prompt], edits, js=hold(f"op-{place}"), **ONE_AT_A_TIME,
        ), f"op-{place}")  # fmt: skip
        landed(row.remove.click(
            lambda now, at=place: [*now[:at], *now[at + 1 :]], edits, edits,
            js=hold(f"remove-{place}"), **ONE_AT_A_TIME,
        ), f"remove-{place}")  # fmt: skip


def others(now: Edits, before: Edits, start: Edits) -> Edits:
    """The edits without those the page began with, if nobody touched those and more came."""
    begun = bool(start) and before == start and now[: len(start)] == start
    return now[len(start) :] if begun and len(now) > len(start) else now


def draw(bench: Workbench, now: Edits, before: Edits, start: Edits, prompt: str) -> list[Any]:
    """The edits kept, twice, then for every part of every row what to show there."""
    now = others(now, before, start)
    if len(now) > ROWS:
        warn(f"There is room for {ROWS} latents; the last was left out.")
        now = now[:ROWS]
    found: list[Any] = [now, now]
    for place in range(ROWS):
        edit = now[place] if place < len(now) else None
        if edit == (before[place] if place < len(before) else None):
            found += [gr.skip()] * 8
        elif edit is None:
            found += [gr.update(visible=False)] + [gr.skip()] * 7
        else:
            found += _row(bench, EditSpec.from_dict(edit), prompt)
    return found


def add(bench: Workbench, now: Edits, source: str, asked: str | None, prompt: str) -> Edits:
    """One more latent: a number, or words of a label. Added once at its own strongest activation.

    Raises UserError where it does not exist or is one of several, or where there is no room.
    """
    if len(now) >= ROWS:
        raise UserError(f"there is room for {ROWS} latents: remove one first")
    spec = EditSpec(bench.sae(source).source, find(bench, source, asked), "add", 0.0)
    if any((one["sae"], one["latent"]) == (spec.sae, spec.latent) for one in now):
        warn(f"Latent {spec.latent} is there twice now: one edit acts after the other.", "Twice")
    return [*now, _with(bench, spec, "add", prompt).to_dict()]


class Several(UserError):
    """More latents than one answer to what was asked for."""

    def __init__(self, words: str, hits: list[Hit]) -> None:
        super().__init__(f"“{words}” is in {len(hits)} labels or names: choose one from the list")
        self.hits = hits


def find(bench: Workbench, source: str, asked: str | None) -> int:
    """The latent that a number or words of a label mean. UserError; `Several` to choose from."""
    words = (asked or "").strip()
    if not words:
        raise UserError("which latent? Type its number, or words of its label")
    loaded = bench.sae(source)
    if number := NUMBER.match(words):
        digits = number[1]
        return exists(loaded, int(digits) if len(digits) < 20 else 10**20)
    if words.lstrip("#+-.")[:1].isdigit():
        raise UserError(
            f"“{words}” is no latent's number: whole ones from 0 to {loaded.sae.num_latents - 1}"
        )
    hits = bench.search(source, words)
    if not hits:
        raise UserError(f"no label of {source} has “{words}”; a number works for every latent")
    exact = [hit for hit in hits if hit.label.casefold() == words.casefold()]
    if len(hits) > 1 and len(exact) != 1:
        raise Several(words, hits)
    return int((exact or hits)[0].latent)


def changed(bench: Workbench, now: Edits, place: int, op: str, prompt: str) -> Edits:
    """Another mode for a row, with a strength that fits it."""
    spec = EditSpec.from_dict(now[place])
    return [*now[:place], _with(bench, spec, op, prompt).to_dict(), *now[place + 1 :]]


def _with(bench: Workbench, spec: EditSpec, op: str, prompt: str) -> EditSpec:
    """A spec in another mode: twice for a factor, nothing for an ablation, else its own maximum.

    What adds and what sets are in the same units, so between them the strength stays.
    """
    plain = spec.to_dict() | {"op": op}
    if spec.op in ("add", "clamp") and op in ("add", "clamp") and spec.amount:
        return EditSpec.from_dict(plain)
    if op in ("scale", "ablate"):
        return EditSpec.from_dict(plain | {"amount": 2.0 if op == "scale" else 0.0})
    whole, _ = strength.unit(bench, EditSpec.from_dict(plain | {"amount": 0.0}), prompt)
    return EditSpec.from_dict(plain | {"amount": float(f"{whole:.3g}")})


def _row(bench: Workbench, spec: EditSpec, prompt: str) -> list[Any]:
    whole, why = strength.unit(bench, spec, prompt)
    scaled = spec.op != "ablate"
    return [
        gr.update(visible=True),
        title(bench, spec, why if scaled else "silenced: its activation is set to 0", whole),
        spec.op,
        gr.update(value=strength.position(spec.amount, whole), visible=scaled,
                  label="Factor" if spec.op == "scale" else "Strength"),
        gr.update(visible=scaled),
        gr.update(value=spec.amount, visible=scaled),
        gr.update(value=spec.when),
        spec.above,
    ]  # fmt: skip


def _put(place: int, field: str) -> Callable[..., tuple[Edits, Edits]]:
    """A value into a row's edit. What it may be is checked when texts are asked for.

    An empty box leaves what was there, but for the condition, which then is none.
    """

    def put(now: Edits, value: float | None, _position: float = 0) -> tuple[Edits, Edits]:
        gone = place >= len(now)  # removed while the event was on its way
        if gone or (value is None and field != "when"):
            return now, now
        written = [*now[:place], now[place] | {field: value}, *now[place + 1 :]]
        return written, written

    return put


def title(bench: Workbench, spec: EditSpec, why: str, unit: float) -> str:
    """Which latent a row is about, as HTML; the page's scripts read the `unit` of its slider."""
    place = escape(bench.sae(spec.sae).name)
    label = escape(bench.label(spec.sae, spec.latent))
    return (
        f"<div class='steer-title' title='{escape(spec.sae)}' data-unit='{unit:.17g}'>"
        f"<b>{place} · #{spec.latent}</b> "
        f"{label} <small>{escape(why)}</small></div>"
    )


def choices(loaded: Loaded, hits: Sequence[Hit] = ()) -> list[tuple[str, str]]:
    """Latents to choose from: those found, then the labelled ones; any other is typed."""
    named = [(latent, loaded.label(latent)) for latent in sorted(list(loaded.labels)[:LISTED])]
    listed = dict([(hit.latent, hit.label) for hit in hits])
    listed |= {latent: label for latent, label in named if label and latent not in listed}
    return [(f"#{latent} · {label}", str(latent)) for latent, label in listed.items()]


def held(name: str, js: str) -> str:
    """`js`, for which Run waits."""
    return f"(...given) => ({hold(name)})(...({js})(...given))"
