"""encode_topk, encode_threshold: pre-activations, ReLU and an exact selection, nothing dense kept.

    scores[t, i] = ⟨x[t] − b_dec, W_enc[i]⟩ + b_enc[i]
    top-k:         the k largest positive scores of each token, largest first
    threshold:     every positive score above θ_i, largest first

*Exact* means: of the scores that this code computed, in float32 or wider, the true selection, the
lowest latent first among equals. The scores exist only a chunk at a time (`dispatch.WORKSPACE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.encode_gradient import backward, save
from saert.kernels.linear import chunk_scores
from saert.kernels.numerics import accumulation_dtype, no_autocast
from saert.kernels.screen import Screen, screened_topk
from saert.kernels.select import threshold_rows, topk_rows


class Encoded(NamedTuple):
    """What an encoder selected.

    Attributes:
        indices: int64 [*tokens, k]; an unused slot has index 0.
        values: [*tokens, k] in the accumulation dtype, descending; an unused slot has value 0.
        nan: bool [*tokens], tokens with a NaN among their scores: their selection means nothing,
            and the caller has to raise.
    """

    indices: Tensor
    values: Tensor
    nan: Tensor


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    weight: Tensor | None = None,
    latents: Tensor | None = None,
    screen: Screen | None = None,
    row_sparse: bool = False,
) -> Encoded:
    """The k largest positive scores of each token (TopK, Gao et al. 2024, section 2.3).

    Args:
        x: [*tokens, d_in], any floating dtype.
        W_enc: [num_latents, d_in]; b_enc: [num_latents] or None; b_dec: [d_in], subtracted from x.
        k: slots per token; the width is min(k, competing latents).
        weight: [num_latents], what scores are multiplied by for the ranking alone (decoder norms);
            taken as a constant by the gradient.
        latents: int64 [E], the only latents that compete, ascending (AuxK: the dead ones). The
            gradient reaches their rows of W_enc.
        screen: a half-precision copy of W_enc that finds candidates, for float32 weights where
            half-precision products are much faster; the result is exact with it too
            (`saert.kernels.screen`). Unused on other devices; waits for the device.
        row_sparse: whether the gradient of W_enc is a sparse COO tensor of the touched rows.

    Differentiable in x, W_enc, b_enc and b_dec, through the values. Works under autocast (which
    does not reach the scores), torch.compile, torch.export and FakeTensor; on CUDA it never waits
    for the device.

    Raises:
        ValueError: shapes that contradict each other, k below 1, or `screen` together with
            `weight` or `latents`.
    """
    _check(x, W_enc, b_enc, b_dec, weight)
    if k < 1:
        raise ValueError(f"encode_topk: k is {k}, expected at least 1")
    if screen is not None and (weight is not None or latents is not None):
        raise ValueError("encode_topk: screen goes with neither weight nor latents")
    half, bounds = (None, None) if screen is None else screen
    if half is not None and half.shape != W_enc.shape:
        raise ValueError(
            f"encode_topk: the screen is {list(half.shape)}, W_enc {list(W_enc.shape)}"
        )
    flat = x.reshape(-1, x.shape[-1])
    found = _topk_op(flat, W_enc, b_enc, b_dec, weight, latents, half, bounds, k, row_sparse)
    return _shaped(found, x)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: float | Tensor,
    *,
    b_dec: Tensor | None = None,
    weight: Tensor | None = None,
    row_sparse: bool = False,
) -> Encoded:
    """Every positive score above its threshold (JumpReLU, BatchTopK at inference; 0 is ReLU).

    `threshold` is a number, or [num_latents]; with `weight` it is compared with score · weight.
    The comparison is strict, and the threshold gets no gradient. The width is the widest token's
    count, at least 1, which depends on the data: this waits for the device. Other arguments and
    errors as for `encode_topk`.
    """
    _check(x, W_enc, b_enc, b_dec, weight)
    level = torch.as_tensor(threshold, dtype=accumulation_dtype(W_enc.dtype), device=x.device)
    if level.shape not in ((), (W_enc.shape[0],)):
        raise ValueError(
            f"encode_threshold: threshold is {list(level.shape)}, expected a number or "
            f"[{W_enc.shape[0]}], one per latent"
        )
    flat = x.reshape(-1, x.shape[-1])
    return _shaped(_threshold_op(flat, W_enc, b_enc, b_dec, level, weight, row_sparse), x)


def encode_topk_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    weight: Tensor | None = None,
    latents: Tensor | None = None,
) -> Encoded:
    """The definition in plain PyTorch, dense; see `encode_topk`. Differentiable in values."""
    scores = _scores_reference(x, W_enc, b_enc, b_dec, latents)
    ranks = scores.relu() if weight is None else scores.relu() * weight
    order = ranks.sort(dim=-1, descending=True, stable=True)
    return _slots(order.values[..., :k], order.indices[..., :k], scores, latents)


def encode_threshold_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: float | Tensor,
    *,
    b_dec: Tensor | None = None,
    weight: Tensor | None = None,
) -> Encoded:
    """The definition in plain PyTorch, dense; see `encode_threshold`. Differentiable in values."""
    scores = _scores_reference(x, W_enc, b_enc, b_dec, None)
    ranks = scores if weight is None else scores * weight
    kept = torch.where((ranks > threshold) & (scores > 0), scores, 0)
    widest = int((kept > 0).sum(-1).max()) if kept.numel() else 0
    order = kept.sort(dim=-1, descending=True, stable=True)
    width = max(1, widest)
    return _slots(order.values[..., :width], order.indices[..., :width], scores, None)


def _scores_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, latents: Tensor | None
) -> Tensor:
    wide = accumulation_dtype(W_enc.dtype)
    x = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
    if latents is not None:
        W_enc, b_enc = W_enc[latents], None if b_enc is None else b_enc[latents]
    scores = x.to(W_enc.dtype).to(wide) @ W_enc.to(wide).T
    return scores if b_enc is None else scores + b_enc.to(wide)


def _slots(ranks: Tensor, chosen: Tensor, scores: Tensor, latents: Tensor | None) -> Encoded:
    """Plain scores of the chosen latents; slots that rank at or below zero are unused."""
    used = ranks > 0
    values = torch.where(used, scores.gather(-1, chosen), 0)
    indices = chosen if latents is None else latents[chosen]
    return Encoded(torch.where(used, indices, 0), values, scores.isnan().any(-1))


# -- the operators ---------------------------------------------------------------------------------


@torch.library.custom_op(
    "saert::encode_topk",
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor? weight, "
    "Tensor? latents, Tensor? screen, Tensor? screen_bounds, int k, bool row_sparse) "
    "-> (Tensor, Tensor, Tensor)",
)
def _topk_op(
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
            W_enc = W_enc[latents]
            b_enc, weight = (None if t is None else t[latents] for t in (b_enc, weight))
        x, bias, weight = _prepared(x, W_enc, b_enc, b_dec, weight)
        k = min(k, W_enc.shape[0])
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
        used = best > 0
        values = best if weight is None else scores.gather(1, indices)
        return indices * used, values.where(used, 0), best[:, 0].isnan()

    parts = [select(scores) for scores in _chunks(x, W_enc, bias)]
    if len(parts) <= 1:  # the common case one token at a time: no copies
        return parts[0] if parts else _nothing(x, k)
    indices, values, nan = (torch.cat(column) for column in zip(*parts, strict=True))
    return indices, values, nan


@torch.library.custom_op(
    "saert::encode_threshold",
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor threshold, "
    "Tensor? weight, bool row_sparse) -> (Tensor, Tensor, Tensor)",
)
def _threshold_op(
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
    for scores in _chunks(x, W_enc, bias):
        ranks = scores if weight is None else scores * weight
        found.append(threshold_rows(scores, (ranks > threshold) & (scores > 0)))
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
    size = dispatch.tokens_per_chunk(W_enc.shape[0], x.dtype)
    fits = W_enc.numel() * x.dtype.itemsize <= dispatch.WIDENED
    if W_enc.dtype != x.dtype and len(x) > size and fits:  # chunks would widen it again and again
        x, W_enc = x.to(W_enc.dtype).to(x.dtype), W_enc.to(x.dtype)
    for part in (x,) if 0 < len(x) <= size else x.split(size) if len(x) else ():
        yield chunk_scores(part, W_enc, bias)


def _prepared(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x − b_dec, b_enc and weight in the accumulation dtype."""
    wide = accumulation_dtype(W_enc.dtype)
    x = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
    bias = None if b_enc is None else b_enc.to(wide)
    return x.contiguous(), bias, None if weight is None else weight.to(wide)


def _with_whole_rows(W: Tensor) -> Tensor:
    return W if W.stride(1) == 1 else W.contiguous()


def _nothing(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The answer for no tokens."""
    none = x.new_zeros(0, k)
    return none.long(), none, none.new_zeros(0, dtype=torch.bool)


@_topk_op.register_fake
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


@_threshold_op.register_fake
def _threshold_fake(
    x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, threshold: Any, weight: Any, _: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(x, W_enc, torch.library.get_ctx().new_dynamic_size(min=1))


def _fake(x: Tensor, W_enc: Tensor, width: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    values = x.new_empty(tokens, width, dtype=accumulation_dtype(W_enc.dtype))
    return values.to(torch.int64), values, x.new_empty(tokens, dtype=torch.bool)


_topk_op.register_autograd(backward, setup_context=save)
_threshold_op.register_autograd(backward, setup_context=save)


def _shaped(found: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Encoded:
    indices, values, nan = found
    tokens = x.shape[:-1]
    width = indices.shape[1]
    return Encoded(
        indices.reshape(*tokens, width), values.reshape(*tokens, width), nan.reshape(tokens)
    )


def _check(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, weight: Tensor | None
) -> None:
    num_latents, d_in = W_enc.shape
    expected = {
        "x": (x, (*x.shape[:-1], d_in)),
        "b_enc": (b_enc, (num_latents,)),
        "b_dec": (b_dec, (d_in,)),
        "weight": (weight, (num_latents,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"encode: {name} is {list(tensor.shape)}, expected {list(shape)} for W_enc "
                f"{list(W_enc.shape)}"
            )
