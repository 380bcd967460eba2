"""Metrics of a model's logits, for `attribute`: functions of [rows, tokens, vocabulary] -> [rows].

Any function of the logits will do; these are bound to the rows that they judge, so that
padding, on either side, counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saert.kernels.numerics import accumulation_dtype

Metric = Callable[[Tensor], Tensor]
"""Logits [rows, tokens, vocabulary] -> [rows], or a scalar: a differentiable number to explain."""

Inputs = Tensor | Mapping[str, Any]
"""Token ids int64 [rows, tokens], or what a tokenizer returns with return_tensors="pt"."""


def tokens_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Token ids int64 [rows, tokens], and bool of the same shape: false at padding.

    Padding is what the attention mask leaves out; a bare tensor of ids has none. Raises TypeError
    or ValueError for anything else than rows of ids with a 2-D mask.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"inputs: token ids are {found}, expected an integer tensor [rows, tokens], or a "
            'mapping with one as "input_ids" (tokenizer(..., return_tensors="pt"))'
        )
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"inputs: token ids are {list(ids.shape)}, expected [rows, tokens]")
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"inputs: attention_mask is {list(mask.shape)}, expected {list(ids.shape)} as input_ids"
        )
    real = mask.bool()
    if not bool(real.any(-1).all()):
        row = int((~real.any(-1)).nonzero()[0])
        raise ValueError(f"inputs: row {row} is all padding; leave it out")
    return ids, real


def next_token_loss(inputs: Inputs) -> Metric:
    """−Σ log p(next token) in nats over the positions of a row whose next token is real.

    A sum, so that a latent's effect does not depend on how long its row is. Raises ValueError if
    a row has no such position.

    >>> loss = next_token_loss(inputs)
    >>> loss(model(**inputs).logits).shape
    torch.Size([1])
    """
    ids, real = tokens_of(inputs)
    counted = real[:, 1:] & real[:, :-1]
    if not bool(counted.any(-1).all()):
        row = int((~counted.any(-1)).nonzero()[0])
        raise ValueError(f"next_token_loss: row {row} has one token, and nothing comes after it")

    def metric(logits: Tensor) -> Tensor:
        _check_rows(logits, ids, "next_token_loss")
        log_p = logits[:, :-1].to(accumulation_dtype(logits.dtype)).log_softmax(-1)
        chosen = log_p.gather(-1, ids[:, 1:, None].to(logits.device)).squeeze(-1)
        return -chosen.where(counted.to(logits.device), 0).sum(-1)

    return metric


def logit_difference(
    inputs: Inputs, answer: int | Sequence[int] | Tensor, wrong: int | Sequence[int] | Tensor
) -> Metric:
    """logit(answer) − logit(wrong) at each row's last real token (Wang et al. 2022, IOI).

    answer, wrong: token ids, one for all rows or one for each.
    """
    ids, real = tokens_of(inputs)
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = columns.where(real, -1).amax(-1).cpu()
    rows = torch.arange(len(ids))
    first, second = (
        torch.as_tensor(chosen, dtype=torch.int64).cpu().expand(len(ids))
        for chosen in (answer, wrong)
    )

    def metric(logits: Tensor) -> Tensor:
        _check_rows(logits, ids, "logit_difference")
        ends = logits[rows, last].to(accumulation_dtype(logits.dtype))  # [rows, vocabulary]
        return ends[rows, first] - ends[rows, second]

    return metric


def token_logit(inputs: Inputs, token: int, position: int) -> Metric:
    """The logit of a vocabulary entry, less the mean over the vocabulary, at one column.

    Less the mean, because a constant added to all logits changes no prediction. Raises ValueError
    for a column that the rows do not have.
    """
    ids, _ = tokens_of(inputs)
    if not -ids.shape[1] <= position < ids.shape[1]:
        raise ValueError(f"token_logit: position {position} of {ids.shape[1]} tokens")

    def metric(logits: Tensor) -> Tensor:
        _check_rows(logits, ids, "token_logit")
        if not 0 <= token < logits.shape[-1]:
            raise ValueError(f"token_logit: token {token} of {logits.shape[-1]} in the vocabulary")
        here = logits[:, position].to(accumulation_dtype(logits.dtype))
        return here[:, token] - here.mean(-1)

    return metric


def _check_rows(logits: Tensor, ids: Tensor, who: str) -> None:
    if logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{who}: it was made for {list(ids.shape)} tokens, but the logits are of "
            f"{list(logits.shape[:2])}"
        )
