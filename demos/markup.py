"""Static pieces of HTML for `gr.HTML(value=…)`: data in, escaped markup out.

Pieces that change while a person looks at them, or that can be chosen, are `saert.demos.widgets`.
Classes and colours are those of style.css.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

BAR, SPACE, TALL = 9, 1, 40  # of a histogram, in SVG units


def heat(
    strings: Sequence[str], values: Sequence[float | None], largest: float, peak: int | None = None
) -> str:
    """One line of text, each token coloured by its value and the one at `peak` underlined.

    `largest` is the value of full colour, in absolute terms; None or NaN leaves a token plain.
    A title says the value. Raises ValueError where strings and values differ in number.
    """
    return (
        "<p class='saert-line'>"
        + "".join(
            _token(string, value, largest, at == peak)
            for at, (string, value) in enumerate(zip(strings, values, strict=True))
        )
        + "</p>"
    )


def histogram(heights: Sequence[float], low: float, high: float, label: str) -> str:
    """Bars over equal bins from `low` to `high`; `label` tells those who cannot see them."""
    top = max(heights, default=0) or 1
    wide = max(len(heights), 1) * (BAR + SPACE)
    rects = "".join(
        f"<rect x='{at * (BAR + SPACE)}' y='{TALL * (1 - share):.2f}' width='{BAR}' "
        f"height='{TALL * share:.2f}'/>"
        for at, share in enumerate(height / top for height in heights)
    )
    said = escape(f"{label}: {len(heights)} bins from {low:.3g} to {high:.3g}")
    return (
        f"<figure class='saert-histogram'><svg viewBox='0 0 {wide} {TALL}' role='img' "
        f"preserveAspectRatio='none' aria-label='{said}'>{rects}</svg>"
        f"<figcaption><span>{low:.3g}</span><span>{escape(label)}</span>"
        f"<span>{high:.3g}</span></figcaption></figure>"
    )


def logits(pairs: Iterable[tuple[str, float]]) -> str:
    """Tokens with a bar for what each gains or loses, in the order given."""
    rows = list(pairs)
    largest = max((abs(value) for _, value in rows), default=0) or 1
    return (
        "<ol class='saert-logits'>"
        + "".join(
            f"<li class='{'minus' if value < 0 else 'plus'}' "
            f"style='--share:{abs(value) / largest:.3f}'><code>{spelled(text)}</code>"
            f"<span>{value:+.2f}</span></li>"
            for text, value in rows
        )
        + "</ol>"
    )


def header(model: str, parameters: int, sentence: str) -> str:
    """The top of the page: what this is, on which model, and the switch between light and dark."""
    size = next(
        f"{parameters / unit:.3g} {name}"
        for unit, name in ((1e9, "billion"), (1e6, "million"), (1, ""))
        if parameters >= unit or unit == 1
    ).strip()
    return (
        "<header class='saert-header'><h1>saert</h1>"
        f"<p>{escape(sentence)}</p>"
        f"<p class='model'><b>{escape(model)}</b> {size} parameters</p>"
        "<button type='button' id='theme-switch' aria-label='Switch between light and dark "
        "colours'>☾</button></header>"
    )


def spelled(text: str) -> str:
    """A token by itself, every space, line break and control character visible, as HTML."""
    return "".join(
        f"<span class='mark'>{shown}</span>" if (shown := mark(char)) else escape(char)
        for char in text
    )


def mark(char: str) -> str:
    """What stands for a character that cannot be seen; empty for one that can."""
    if char.isprintable() and char != " ":
        return ""
    return {" ": "·", "\n": "↵", "\r": "␍", "\t": "→"}.get(char, f"U+{ord(char):04X}")


def running(text: str) -> str:
    """A token amid others, as HTML: a line break is visible, and so are spaces without a word."""
    if not text.strip():
        return spelled(text)
    return "".join(spelled(char) if char in "\n\r\t" else escape(char) for char in text)


def _token(text: str, value: float | None, largest: float, peak: bool) -> str:
    classes = "tk peak" if peak else "tk"
    if value is None or not math.isfinite(value):
        return f"<span class='{classes}'>{running(text)}</span>"
    share = min(abs(value) / largest, 1) if largest > 0 else 0.0
    hue = " minus" if value < 0 else ""
    return (
        f"<span class='{classes}{hue}' style='--heat:{share:.3f}' title='{value:.3g}'>"
        f"{running(text)}</span>"
    )
