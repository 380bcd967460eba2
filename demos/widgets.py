"""Small pieces of HTML that gradio does not have: tokens with heat, latents with bars, figures.

Each is a `gr.HTML` whose value is plain data, drawn by widgets.js: text stays text whatever it
holds. What can be chosen is a button, one stop for Tab and then the arrow keys, and choosing fires
`select` with an index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import gradio as gr

DRAW = (Path(__file__).parent / "static" / "widgets.js").read_text("utf-8")


class Token(TypedDict, total=False):
    """A token to show: heat from -1 to 1 (None: no heat), `title` says it in words."""

    text: str
    heat: float | None
    title: str
    selected: bool


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


def tokens(label: str, elem_id: str, *, choose: bool = False, empty: str = "") -> gr.HTML:
    """Text as tokens with heat; value: list of `Token`. With `choose`, each is a button.

    `empty` is what to say while there are none.
    """
    return _html(label, elem_id, "tokens", choose, empty)


def bars(label: str, elem_id: str, *, choose: bool = False, empty: str = "") -> gr.HTML:
    """A list with bars, for latents and logits; value: list of `Bar`."""
    return _html(label, elem_id, "bars", choose, empty)


def figures(label: str, elem_id: str, *, empty: str = "") -> gr.HTML:
    """Numbers in a row; value: list of `Figure`."""
    return _html(label, elem_id, "figures", False, empty)


def script(kind: str, choose: bool, empty: str) -> str:
    """What the browser runs for a widget: `element`, `props`, `trigger` and `watch` are given."""
    given = {"KIND": kind, "CHOOSE": choose, "EMPTY": empty}
    return "".join(f"const {k} = {json.dumps(v)};\n" for k, v in given.items()) + DRAW


def _html(label: str, elem_id: str, kind: str, choose: bool, empty: str) -> gr.HTML:
    options: dict[str, Any] = {"js_on_load": script(kind, choose, empty)}
    return gr.HTML(
        value=[], label=label, show_label=True, container=True, apply_default_css=False,
        html_template="<span></span>", elem_id=elem_id, elem_classes=[f"saert-{kind}"], **options,
    )  # fmt: skip
