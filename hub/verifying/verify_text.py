"""Rows of tokens to verify on, and which of them count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.own_text import own_text

CONTEXT = 128


@dataclass(frozen=True)
class Rows:
    """Attributes:
    ids: int64 [rows, context], padded on the right: a causal model does not look ahead.
    real: bool of the same shape, false at padding.
    used: bool of the same shape: real, not special, and not the first of its row, whose hidden
        states are many times longer than others in most models and would decide every sum.
    """

    ids: Tensor
    real: Tensor
    used: Tensor


def rows_of(
    model: Any, tokenizer: Any, inputs: Tensor | Mapping[str, Any] | Sequence[str] | None, n: int
) -> Rows:
    """Rows that hold at least n used tokens, or all that `inputs` has.

    Raises:
        TypeError, ValueError: inputs of another kind or shape, ids that the model does not know, a
            text without a tokenizer, no token left to measure.
    """
    if inputs is None:
        if not hasattr(model, "generate"):
            raise ValueError(f"{type(model).__name__} cannot write text of its own: pass inputs=")
        width = min(CONTEXT, _limit(model) or CONTEXT)
        ids = own_text(model, _start(model, tokenizer), -(-n // (width - 1)), width)
        real = torch.ones_like(ids, dtype=torch.bool)
    elif isinstance(inputs, Tensor):
        ids, real = inputs, torch.ones_like(inputs, dtype=torch.bool)
    elif isinstance(inputs, Mapping) or hasattr(inputs, "keys"):
        ids, real = _masked(inputs)
    else:
        ids, real = _tokenised(model, tokenizer, inputs)
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"inputs are {ids.dtype} {list(ids.shape)}, expected token ids int64 [rows, context]"
        )
    ids, real = ids.cpu().long(), real.cpu()
    known = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and not 0 <= int(ids[real].min()) <= int(ids[real].max()) < known:
        raise ValueError(
            f"inputs hold ids {int(ids[real].min())} to {int(ids[real].max())}, but the model has "
            f"{known} tokens: do they come from its own tokenizer?"
        )
    special = torch.tensor(sorted(_special(model, tokenizer)), dtype=torch.int64)
    used = real & ~torch.isin(ids, special)
    used[:, :1] = False
    if not used.any():
        raise ValueError(
            f"no token of {list(ids.shape)} is left to measure: all are padding, special, or the "
            "first of their row"
        )
    enough = int((used.sum(1).cumsum(0) < n).sum()) + 1
    return Rows(ids[:enough], real[:enough], used[:enough])


def _tokenised(model: Any, tokenizer: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise TypeError(
            f"inputs are {type(inputs).__name__}, expected token ids [rows, context], what a "
            "tokenizer returns, or texts"
        )
    if tokenizer is None:
        raise ValueError("inputs are texts: pass tokenizer=")
    rows = [tokenizer(text)["input_ids"][: _limit(model)] for text in texts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.view(len(rows), width), torch.arange(width) < lengths[:, None]


def _masked(inputs: Any) -> tuple[Tensor, Tensor]:
    """A batch of a tokenizer, its padding moved to the right."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"input_ids are a {type(ids).__name__}, expected a tensor: return_tensors='pt'"
        )
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(real.shape)}, but input_ids are {list(ids.shape)}"
        )
    order = (~real).long().argsort(dim=-1, stable=True)
    return ids.gather(-1, order), real.gather(-1, order)


def _special(model: Any, tokenizer: Any) -> set[int]:
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    config = model.config.get_text_config()
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        values = value if isinstance(value, list | tuple) else [value]
        found |= {int(one) for one in values if one is not None}
    return found


def _start(model: Any, tokenizer: Any) -> int:
    sources = (tokenizer, model.config.get_text_config())
    for name in ("bos_token_id", "eos_token_id"):
        for source in sources:
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int):
                return value
    raise ValueError("the model has no start token to write text from: pass inputs=")


def _limit(model: Any) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
