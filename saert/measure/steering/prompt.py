"""A prompt as token ids, and token ids as pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW = 8  # tokens before, whose end decides whether a space is part of the next
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def encode_prompt(tokenizer: Any, prompt: str, chat: bool = False) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [1, T] each.

    With `chat`, what a user says, in the model's chat template, up to where the answer begins.

    Raises ValueError: no tokens; a tokenizer without a chat template.
    """
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat: the model's tokenizer has no chat template; continue a text instead"
        )
    else:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens; write at least one word")
    ids = ids.long()  # no tokens are float
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_room(model: Any, tokens: int, more: int) -> None:
    """Raise ValueError if a prompt and what is asked for do not fit the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + more > limit:
        asked = f" and {more} more were asked for" if more else ""
        raise ValueError(f"the prompt has {tokens} tokens{asked}; the model holds {limit}")


class Pieces:
    """The text that each token adds. Together they are the decoded text, special tokens included.

    A token that ends inside a character adds nothing; the one that completes it adds all of it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        # decoding starts at one, and is known up to the other
        self._from, self._told = max(0, len(before) - WINDOW), len(before)

    def add(self, token: int, last: bool = False) -> str:
        """The piece of the next token; after the `last` one nothing is held back."""
        self._ids.append(token)
        known = self._decode(self._ids[self._from : self._told])
        now = self._decode(self._ids[self._from :])
        if now.endswith(INCOMPLETE) and not last:
            return ""
        self._from, self._told = self._told, len(self._ids)
        return now[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
