"""The rows of the Steer tab: a latent each, with what to do to it, how strongly and when.

`Shared.edits` is what counts. A row that a person changes writes to it; what anyone else writes
there (a preset, a link, another tab) is drawn. `drawn` remembers what the rows show, so a row is
never drawn over the hand that is moving it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from saert.demos.errors import shown
from saert.demos.steer import strength
from saert.demos.steer.setup import Edits
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.steering import EditSpec

ROWS = 8
LISTED = 2000  # labels in the list; a search finds the others
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
    amount: gr.Number
    unit: gr.Number
    when: gr.Number
    above: gr.Number
    remove: gr.Button

    @property
    def drawn(self) -> list[Any]:
        """What `draw` writes."""
        return [self.box, self.title, self.op, self.slider, self.amount, self.unit, self.when,
                self.above]  # fmt: skip


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
            slider = gr.Slider(
                -100, 100, 50, step=1, label="Strength", elem_id=f"{name}-slider",
                elem_classes=["strength"], scale=3, min_width=180, buttons=[],
            )  # fmt: skip
            amount = gr.Number(
                label="Exactly", elem_id=f"{name}-amount", scale=1, min_width=90, step=0.1
            )
            unit = gr.Number(visible="hidden", elem_id=f"{name}-unit")
        with gr.Row():
            when = gr.Number(
                None, label="Only where latent", placeholder="always", precision=0,
                elem_id=f"{name}-when", scale=1, min_width=120,
            )  # fmt: skip
            above = gr.Number(
                0.0, label="exceeds", elem_id=f"{name}-above", scale=1, min_width=120, step=0.5
            )
    return Row(box, title, op, slider, amount, unit, when, above, remove)


def connect(bench: Workbench, rows: list[Row], edits: gr.State, prompt: gr.Textbox) -> None:
    """Rows to edits and edits to rows."""
    drawn = gr.State([])
    everything = [part for row in rows for part in row.drawn]
    edits.change(
        shown(lambda now, before, text: draw(bench, now, before, text)),
        [edits, drawn, prompt], [edits, drawn, *everything], **ONE_AT_A_TIME,
    )  # fmt: skip
    for place, row in enumerate(rows):
        both = [edits, drawn]
        latest: dict[str, Any] = {"trigger_mode": "always_last", **ONE_AT_A_TIME}
        row.slider.input(None, [row.slider, row.unit], row.amount, js=strength.AMOUNT_JS)
        row.slider.input(_moved(place), [edits, row.slider, row.unit], both, **latest)
        row.amount.input(None, [row.amount, row.unit], row.slider, js=strength.POSITION_JS)
        for field, part in (("amount", row.amount), ("when", row.when), ("above", row.above)):
            part.input(_put(place, field), [edits, part], both, **latest)
        row.op.input(
            shown(lambda now, op, text, at=place: changed(bench, now, at, op, text)),
            [edits, row.op, prompt], edits, **ONE_AT_A_TIME,
        )  # fmt: skip
        row.remove.click(
            lambda now, at=place: [*now[:at], *now[at + 1 :]], edits, edits, **ONE_AT_A_TIME
        )


def draw(bench: Workbench, now: Edits, before: Edits, prompt: str) -> list[Any]:
    """The edits kept, twice, then for every part of every row what to show there."""
    if len(now) > ROWS:
        gr.Warning(f"There is room for {ROWS} latents; the last was left out.")
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
    spec = EditSpec(source, find(bench, source, asked), "add", 0.0)
    return [*now, _with(bench, spec, "add", prompt).to_dict()]


def find(bench: Workbench, source: str, asked: str | None) -> int:
    """The latent that a number or words of a label mean, or UserError."""
    words = (asked or "").strip()
    if not words:
        raise UserError("which latent? Type its number, or words of its label")
    width = bench.sae(source).sae.num_latents
    number = words.partition(" ")[0]
    if number.isascii() and number.removeprefix("-").isdigit():
        if not 0 <= int(number) < width:
            raise UserError(f"latent {number}: {source} has latents 0 to {width - 1}")
        return int(number)
    hits = bench.search(source, words)
    if not hits:
        raise UserError(f"no label of {source} has {words!r}; a number works for every latent")
    exact = [hit for hit in hits if hit.label.casefold() == words.casefold()]
    if len(hits) > 1 and len(exact) != 1:
        some = ", ".join(f"{hit.latent} ({hit.label})" for hit in hits[:4])
        raise UserError(f"{words!r} is in {len(hits)} labels: choose one of {some}")
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
        title(bench, spec, why if scaled else "silenced: its activation is set to 0"),
        spec.op,
        gr.update(value=strength.position(spec.amount, whole), visible=scaled,
                  label="Factor" if spec.op == "scale" else "Strength"),
        gr.update(value=spec.amount, visible=scaled),
        whole,
        gr.update(value=spec.when),
        spec.above,
    ]  # fmt: skip


def _moved(place: int) -> Callable[..., tuple[Edits, Edits]]:
    def move(now: Edits, position: float, unit: float) -> tuple[Edits, Edits]:
        return _put(place, "amount")(now, strength.amount(position, unit))

    return move


def _put(place: int, field: str) -> Callable[..., tuple[Edits, Edits]]:
    """A value into a row's edit. What it may be is checked when texts are asked for."""

    def put(now: Edits, value: float | None) -> tuple[Edits, Edits]:
        if place >= len(now):  # removed while the event was on its way
            return now, now
        written = [*now[:place], now[place] | {field: value}, *now[place + 1 :]]
        return written, written

    return put


def title(bench: Workbench, spec: EditSpec, why: str) -> str:
    """Which latent a row is about, as HTML."""
    place = escape(bench.sae(spec.sae).name)
    label = escape(bench.label(spec.sae, spec.latent))
    return (
        f"<div class='steer-title' title='{escape(spec.sae)}'><b>{place} · {spec.latent}</b> "
        f"{label} <small>{escape(why)}</small></div>"
    )


def choices(bench: Workbench, source: str) -> list[tuple[str, str]]:
    """The labelled latents of an SAE to choose from; any other is typed."""
    labels = bench.sae(source).labels
    named = sorted((latent, bench.label(source, latent)) for latent in list(labels)[:LISTED])
    return [(f"{latent} · {label}", str(latent)) for latent, label in named if label]
