"""Tokens as text while they come: no half characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE = 6  # tokens of the prompt that tokens after it are decoded with, for their spaces
LONGEST = 16  # tokens that one character may take


class Text:
    """The text of an answer, handed out as far as it is certain.

    Args:
        prompt: the ids before the answer.
        stops: texts that end it; they are not part of it.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = list(prompt[-BEFORE:])
        self._begin, self._done = 0, len(self._ids)  # decoded from; text is out up to
        self._held = ""  # may be the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said after one more token."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._pass_on(self._new(final=False), final=False)

    def end(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._pass_on(self._new(final=True), final=True)

    def _new(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._begin : self._done])
        now = self._decode(self._ids[self._begin :])
        half = now.endswith("\ufffd") and len(self._ids) - self._done < LONGEST
        if half and not final:
            return ""
        self._begin, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _pass_on(self, new: str, *, final: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may begin a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
