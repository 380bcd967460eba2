"""Between the library's numbers and the widgets: text to tokens, numbers to words and heat."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from saert.demos.markup import mark
from saert.demos.widgets import Bar, Token
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.steering import encode_prompt
from saert.measure.steering.prompt import check_room
from saert.measure.steering.spec import whole

CHARACTERS = 16 * 1024  # that one visitor's text may have: before it is tokenised, which takes time
LONGEST = 1024  # tokens of it
NEW = 400  # tokens that the model may write for it
PACE = 0.1  # seconds between two updates of a growing text

T = TypeVar("T")


def ids_of(bench: Workbench, text: str, *, chat: bool = False, more: int = 0) -> Tensor:
    """A text's token ids, int64 [1, tokens]; with `chat`, in the model's chat template.

    Raises UserError without text, with too much of it, or if it and `more` new tokens do not fit
    the model.
    """
    if not isinstance(text, str):
        raise TypeError(f"the text is {type(text).__name__}, expected words")
    if not text.strip():
        raise UserError("there is no text; write at least one word")
    if len(text) > CHARACTERS:
        raise UserError(
            f"the text has {len(text):,} characters; at most {CHARACTERS:,} are looked at here"
        )
    model = bench.session.model
    ids = encode_prompt(bench.tokenizer, text, chat)["input_ids"].to(model.device)
    if ids.shape[1] > LONGEST:
        raise UserError(f"the text has {ids.shape[1]} tokens; at most {LONGEST} are looked at here")
    try:
        check_room(model, ids.shape[1], more)
    except ValueError as error:
        raise UserError(str(error)) from None
    return ids


def new_tokens(count: int) -> int:
    """How many new tokens are asked for, if they may be. Raises TypeError, ValueError."""
    return whole("max_new_tokens", count, 1, NEW)


def paced(states: Iterator[T], every: float = PACE) -> Iterator[T]:
    """States of something that grows: the first, the last, and between them one every so often.

    Each is sent whole, so to send all of them would take the square of their number.
    """
    due, state = -math.inf, None
    for state in states:
        if fresh := time.monotonic() >= due:
            yield state
            due = time.monotonic() + every
    if state is not None and not fresh:
        yield state


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
    return "".join(mark(char) or char for char in text)


def chosen_of(event: Any, length: int) -> int:
    """The index that a widget's `select` brought. Raises UserError for one of an older text."""
    index = int(event.index)
    if not 0 <= index < length:
        raise UserError("this has changed since; choose again")
    return index
