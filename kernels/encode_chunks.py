"""The encoders as operators: scores of a few tokens at a time, a selection from each such chunk.

`saert.kernels.encode` says what they compute. On a GPU `kernels/gpu` does both steps; elsewhere the
product is `linear.chunk_scores` and the selection is in `select`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.encode_gradient import backward, save
from saert.kernels.linear import chunk_scores
from saert.kernels.numerics import HALF, accumulation_dtype, no_autocast
from saert.kernels.operators import operator
from saert.kernels.screen import screened_topk
from saert.kernels.select import descends, threshold_rows, topk_rows


def _run_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    weight: Tensor | None,
    latents: Tensor | None,
    screen: Tensor | None,
    screen_bounds: Tensor | None,
    k: int,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(x):
        if latents is not None:
            _check_latents(latents, W_enc.shape[0])
            W_enc = W_enc[latents]
            b_enc, weight = (None if t is None else t[latents] for t in (b_enc, weight))
        x, bias, weight = _prepared(x, W_enc, b_enc, b_dec, weight)
        k = min(k, W_enc.shape[0])
        if not k or not len(x):
            return _nothing(x, k)
        if screen is not None and screen_bounds is not None and dispatch.screens(W_enc):
            return screened_topk(x, W_enc, bias, k, screen, screen_bounds, _topk)
        indices, values, nan = _topk(x, W_enc, bias, k, weight)
        if latents is not None:
            indices = torch.where(values > 0, latents[indices], 0)
        return indices, values, nan


def _topk(
    x: Tensor, W_enc: Tensor, bias: Tensor | None, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, values, nan) of prepared inputs."""
    if dispatch.uses_triton(W_enc, k):
        from saert.kernels.gpu import encode as gpu

        return gpu.encode_topk(x, _with_whole_rows(W_enc), bias, k, weight)
    return _topk_in_chunks(x, W_enc, bias, k, weight)


def _topk_in_chunks(
    x: Tensor, W_enc: Tensor, bias: Tensor | None, k: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    def select(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ranks = scores if weight is None else scores.relu() * weight
        best, indices = topk_rows(ranks, k)
        if weight is None and descends(best, above=0.0):  # nothing unused, tied or NaN
            nan = best.new_zeros(len(best), dtype=torch.bool)
            return indices.contiguous(), best.contiguous(), nan
        used = best > 0
        values = best if weight is None else scores.gather(1, indices)
        return indices * used, values.where(used, 0), best[:, 0].isnan()

    parts = [select(scores) for scores in _chunks(x, W_enc, bias)]
    if len(parts) == 1:  # the common case one token at a time: no copies
        return parts[0]
    indices, values, nan = (torch.cat(column) for column in zip(*parts, strict=True))
    return indices, values, nan


def _run_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor,
    weight: Tensor | None,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(x):
        x, bias, weight = _prepared(x, W_enc, b_enc, b_dec, weight)
        if dispatch.uses_triton(W_enc):
            from saert.kernels.gpu import encode as gpu

            rows = _with_whole_rows(W_enc)
            return gpu.encode_threshold(x, rows, bias, threshold.view(-1), weight)
        return _threshold_in_chunks(x, W_enc, bias, threshold, weight)


def _threshold_in_chunks(
    x: Tensor, W_enc: Tensor, bias: Tensor | None, threshold: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    found, nan = [], []
    positive = threshold.clamp_min(0)
    for scores in _chunks(x, W_enc, bias):
        kept = scores > (positive if weight is None else 0)
        if weight is not None:
            kept &= scores * weight > threshold
        found.append(threshold_rows(scores, kept))
        nan.append(scores.amax(-1).isnan())
    if not found:
        return _nothing(x, 1)
    width = max(values.shape[1] for values, _ in found)
    pad = torch.nn.functional.pad
    values, indices = (
        torch.cat([pad(part, (0, width - part.shape[1])) for part in column])
        for column in zip(*found, strict=True)
    )
    return indices, values, torch.cat(nan)


def _chunks(x: Tensor, W_enc: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """Scores [T, num_latents] of a few tokens at a time."""
    wide = accumulation_dtype(W_enc.dtype)
    size = dispatch.tokens_per_chunk(W_enc.shape[0], wide)
    fits = W_enc.numel() * wide.itemsize <= dispatch.WIDENED
    if W_enc.dtype != wide and len(x) > size and fits:  # chunks would widen it again and again
        x, W_enc = x.to(wide), W_enc.to(wide)
    for begin in range(0, len(x), size):
        yield chunk_scores(x[begin : begin + size], W_enc, bias)


def _prepared(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x − b_dec, b_enc and weight in the accumulation dtype.

    x − b_dec is in the dtype of half-precision weights, if x is half precision too.
    """
    wide, halved = accumulation_dtype(W_enc.dtype), x.dtype in HALF and W_enc.dtype in HALF
    x = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
    x = x.to(W_enc.dtype) if halved else x
    bias = None if b_enc is None else b_enc.to(wide)
    # contiguous, the bias too: oneDNN does not look at its strides
    bias = None if bias is None else bias.contiguous()
    weight = None if weight is None else weight.to(wide).contiguous()
    return x.contiguous(), bias, weight


def _with_whole_rows(W: Tensor) -> Tensor:
    return W if W.stride(1) == 1 else W.contiguous()


def _check_latents(latents: Tensor, num_latents: int) -> None:
    """On a CPU, where looking at them costs nothing."""
    if latents.device.type != "cpu" or not len(latents):
        return
    inside = latents[0] >= 0 and latents[-1] < num_latents
    if not (inside and (latents[1:] > latents[:-1]).all()):
        raise ValueError(
            f"encode_topk: latents must be ascending, each once, from 0 to {num_latents - 1}; "
            f"found {latents.min()} to {latents.max()}"
        )


def _nothing(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The answer for no tokens, or where nothing competes."""
    none = x.new_zeros(len(x), k, dtype=accumulation_dtype(x.dtype))
    return none.long(), none, none.new_zeros(len(x), dtype=torch.bool)


def _topk_fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Any,
    b_dec: Any,
    weight: Any,
    latents: Any,
    screen: Any,
    bounds: Any,
    k: int,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    competing = W_enc.shape[0] if latents is None else latents.shape[0]
    return _fake(x, W_enc, min(k, competing))


def _threshold_fake(
    x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, threshold: Any, weight: Any, _: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(x, W_enc, torch.library.get_ctx().new_dynamic_size(min=1))


def _fake(x: Tensor, W_enc: Tensor, width: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    values = x.new_empty(tokens, width, dtype=accumulation_dtype(W_enc.dtype))
    return values.to(torch.int64), values, x.new_empty(tokens, dtype=torch.bool)


topk_op = operator(
    "encode_topk(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor? weight, "
    "Tensor? latents, Tensor? screen, Tensor? screen_bounds, int k, bool row_sparse) "
    "-> (Tensor, Tensor, Tensor)",
    _run_topk,
    _topk_fake,
    backward,
    save,
)
threshold_op = operator(
    "encode_threshold(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor threshold, "
    "Tensor? weight, bool row_sparse) -> (Tensor, Tensor, Tensor)",
    _run_threshold,
    _threshold_fake,
    backward,
    save,
)
