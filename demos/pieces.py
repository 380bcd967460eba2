"""Between the library's numbers and the widgets: text to tokens, numbers to words and heat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from saert.demos.widgets import Bar, Token
from saert.demos.workbench import Workbench
from saert.hub.session import UserError

LONGEST = 1024  # tokens that one visitor's text may have


def ids_of(bench: Workbench, text: str) -> Tensor:
    """A text's token ids, int64 [1, tokens]. Raises UserError without text, or with too much."""
    if not text.strip():
        raise UserError("there is no text; write at least one word")
    ids: Tensor = bench.session.encode(text)["input_ids"]
    if ids.shape[1] > LONGEST:
        raise UserError(f"the text has {ids.shape[1]} tokens; at most {LONGEST} are looked at here")
    return ids


def place(position: int, length: int) -> int:
    """A position from 0, given one that may count from the end."""
    if not -length <= position < length:
        raise UserError(f"token {position} of a text of {length} tokens; they count from 0")
    return position % length


def number(x: float) -> float | None:
    """For JSON, which knows neither NaN nor infinity."""
    return float(x) if math.isfinite(x) else None


def numbers(column: Tensor) -> list[float | None]:
    """`number` of a 1-D tensor."""
    return [number(x) for x in column.tolist()]


def said(x: float | None, form: str = "+.3g", unit: str = "") -> str:
    """A number in words; "–" where there is none."""
    return "–" if x is None else f"{x:{form}}{unit}"


def tokens_with(
    strings: Sequence[str],
    values: Sequence[float | None] | None = None,
    name: str = "",
    *,
    selected: int | None = None,
    largest: float | None = None,
    form: str = ".3g",
) -> list[Token]:
    """Tokens for the widget: coloured by `values`, in units of `largest` or of the largest."""
    filled = [None] * len(strings) if values is None else list(values)
    top = largest or max((abs(x) for x in filled if x is not None), default=0) or 1.0
    return [
        Token(
            text=text,
            heat=None if x is None else max(-1.0, min(1.0, x / top)),
            title=f"token {i}" if x is None else f"token {i}: {name} {x:{form}}",
            selected=i == selected,
        )
        for i, (text, x) in enumerate(zip(strings, filled, strict=True))
    ]


def bars_with(
    rows: Sequence[tuple[str, str, str, float]], selected: int | None = None
) -> list[Bar]:
    """Bars for the widget: (name, label, value in words, length) each, the longest of share 1."""
    top = max((abs(length) for *_, length in rows), default=0) or 1.0
    return [
        Bar(name=name, label=label, value=value, share=length / top, selected=i == selected)
        for i, (name, label, value, length) in enumerate(rows)
    ]


def quoted(text: str) -> str:
    """A token amid a sentence."""
    return f"“{spelled(text) if not text.strip() else text.strip()}”"


def spelled(text: str) -> str:
    """A token by itself, with spaces and line breaks visible."""
    for hidden, mark in ((" ", "·"), ("\n", "↵"), ("\t", "→")):
        text = text.replace(hidden, mark)
    return text


def chosen_of(event: Any, length: int) -> int:
    """The index that a widget's `select` brought. Raises UserError for one of an older text."""
    index = int(event.index)
    if not 0 <= index < length:
        raise UserError("this has changed since; choose again")
    return index
