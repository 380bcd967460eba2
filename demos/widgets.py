"""Small pieces of HTML that gradio does not have: tokens with heat, latents with bars, figures.

Each is a `gr.HTML` whose value is plain data, drawn by widgets.js: text stays text whatever it
holds. What can be chosen is a button, one stop for Tab and then the arrow keys, and choosing fires
`select` with an index.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import gradio as gr

CHANGE_FULL = 3.0
"""Nats of change of a log-probability that have full colour, on every tab."""
KL_FULL = 1.0
"""Nats of KL divergence that have full colour, on every tab."""
CHANGE_LEGEND = (f"{CHANGE_FULL:g} nats less likely", f"{CHANGE_FULL:g} nats more likely")
KL_LEGEND = ("", f"{KL_FULL:g} nat of KL divergence, or more")
DRAW = (Path(__file__).parent / "static" / "widgets.js").read_text("utf-8")


class Token(TypedDict, total=False):
    """A token to show: heat from -1 to 1 (None: no heat), `title` says it in words.

    `muted` tokens stand back: special ones, and those that were given rather than written.
    """

    text: str
    heat: float | None
    title: str
    selected: bool
    muted: bool


class Bar(TypedDict, total=False):
    """A latent, or anything with a bar: `share` of the longest from -1 to 1."""

    name: str
    label: str
    value: str
    share: float
    selected: bool


class Figure(TypedDict, total=False):
    """A number with its name; `note` explains it."""

    name: str
    value: str
    note: str


def tokens(
    label: str, elem_id: str, *, choose: bool = False, empty: str = "",
    legend: Sequence[str] = (),
) -> gr.HTML:  # fmt: skip
    """Text as tokens with heat; value: list of `Token`. With `choose`, each is a button.

    `empty` is what to say while there are none. The `legend` says what full colour is of less and
    of more than nothing (“” where heat has no sign); a handler changes it by `gr.HTML(legend=…)`.
    """
    return _html(label, elem_id, "tokens", choose, empty, legend=list(legend))


def bars(
    label: str, elem_id: str, *, choose: bool = False, empty: str = "", marks: bool = False
) -> gr.HTML:
    """A list with bars, for latents and logits; value: list of `Bar`.

    With `marks`, what is chosen is `selected` in the value at once, before any handler has run.
    """
    return _html(label, elem_id, "bars", choose, empty, marks)


def figures(label: str, elem_id: str, *, empty: str = "") -> gr.HTML:
    """Numbers in a row; value: list of `Figure`."""
    return _html(label, elem_id, "figures", False, empty)


def script(kind: str, choose: bool, empty: str, marks: bool = False) -> str:
    """What the browser runs for a widget: `element`, `props`, `trigger` and `watch` are given."""
    given = {"KIND": kind, "CHOOSE": choose, "EMPTY": empty, "AT_ONCE": marks}
    return "".join(f"const {k} = {json.dumps(v)};\n" for k, v in given.items()) + DRAW


def _html(
    label: str, elem_id: str, kind: str, choose: bool, empty: str, marks: bool = False, **props: Any
) -> gr.HTML:
    options: dict[str, Any] = {"js_on_load": script(kind, choose, empty, marks), **props}
    return gr.HTML(
        value=[], label=label, show_label=True, container=True, apply_default_css=False,
        html_template="<span></span>", elem_id=elem_id, elem_classes=[f"saert-{kind}"], **options,
    )  # fmt: skip
