"""Every token of a tokenizer as a string of its own, for reading and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def vocabulary(tokenizer: Any, ids: Sequence[int] | None = None) -> list[str]:
    """The string of each token id, or of those given, white space as it is.

    A token that is part of a character keeps its vocabulary's spelling (`âĢ`, `<0xE2>`), since
    decoded by itself it would be the same question mark as all others.
    """
    ids = range(len(tokenizer)) if ids is None else ids
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    decoded = tokenizer.batch_decode([[i] for i in ids])
    return [_string(a, b) for a, b in zip(raw, decoded, strict=True)]


def _string(raw: str | bytes | None, decoded: str) -> str:
    if raw is None:  # an id that the tokenizer leaves empty
        return ""
    if isinstance(raw, bytes):
        return decoded if "�" not in decoded else repr(raw)[2:-1]
    if raw.startswith("▁"):  # sentencepiece: decoding a single token drops its space
        return raw.replace("▁", " ")
    return decoded if decoded and "�" not in decoded else raw
