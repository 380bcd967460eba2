"""Small pieces of HTML that gradio does not have: tokens with heat, latents with bars, figures.

Each is a `gr.HTML` whose value is plain data; the template in the browser escapes all text. What
can be chosen is a `<button>`, so a keyboard reaches it, and choosing fires `select` with an index.
"""

from __future__ import annotations

from typing import Any, TypedDict

import gradio as gr

ESCAPE = "const esc = s => String(s).replace(/[&<>\"']/g, c => `&#${c.charCodeAt(0)};`);"
ON_SELECT = """
element.addEventListener('click', e => {
  const chosen = e.target.closest('[data-index]');
  if (chosen) trigger('select', {index: +chosen.dataset.index});
});
"""


class Token(TypedDict, total=False):
    """A token to show: heat from -1 to 1 (None: no heat), `title` says it in words."""

    text: str
    heat: float | None
    title: str
    selected: bool


class Bar(TypedDict, total=False):
    """A latent, or anything with a bar: `share` of the longest from 0 to 1."""

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


def tokens(label: str, elem_id: str, *, choose: bool = False) -> gr.HTML:
    """Text as tokens with heat; value: list of `Token`. With `choose`, each is a button."""
    tag = "button type='button'" if choose else "span"
    template = (
        "${(() => {" + ESCAPE + "return (value || []).map((t, i) => "
        f"`<{tag} class='tk${{t.selected ? ' on' : ''}}' data-index='${{i}}' "
        "style='--heat:${t.heat ?? 0}' title='${esc(t.title ?? '')}'>${esc(t.text)}"
        f"</{tag.split()[0]}>`).join('');" + "})()}"
    )
    return _html(label, elem_id, "tokens", template, choose)


def bars(label: str, elem_id: str, *, choose: bool = False) -> gr.HTML:
    """A list with bars, for latents and logits; value: list of `Bar`."""
    tag = "button type='button'" if choose else "div"
    template = (
        "${(() => {" + ESCAPE + "return (value || []).map((b, i) => "
        f"`<{tag} class='bar${{b.selected ? ' on' : ''}}' data-index='${{i}}' "
        "style='--share:${b.share ?? 0}'><b>${esc(b.name)}</b> <i>${esc(b.label ?? '')}</i> "
        f"<span>${{esc(b.value ?? '')}}</span></{tag.split()[0]}>`).join('');" + "})()}"
    )
    return _html(label, elem_id, "bars", template, choose)


def figures(label: str, elem_id: str) -> gr.HTML:
    """Numbers in a row; value: list of `Figure`."""
    template = (
        "${(() => {" + ESCAPE + "return (value || []).map(f => "
        "`<div class='figure' title='${esc(f.note ?? '')}'><b>${esc(f.value)}</b>"
        "<span>${esc(f.name)}</span></div>`).join('');" + "})()}"
    )
    return _html(label, elem_id, "figures", template, False)


def _html(label: str, elem_id: str, kind: str, template: str, choose: bool) -> gr.HTML:
    options: dict[str, Any] = {"js_on_load": ON_SELECT if choose else None}
    return gr.HTML(
        value=[], label=label, show_label=True, container=True, html_template=template,
        elem_id=elem_id, elem_classes=[f"saert-{kind}"], **options,
    )  # fmt: skip
