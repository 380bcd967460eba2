"""encode_topk, encode_threshold: pre-activations, ReLU and an exact selection, nothing dense kept.

    scores[t, i] = ⟨x[t] − b_dec, W_enc[i]⟩ + b_enc[i]
    top-k:         the k largest positive scores of each token, largest first
    threshold:     every positive score above θ_i, largest first

*Exact* means: of the scores that this code computed, in float32 or wider, the true selection, the
lowest latent first among equals. The scores exist only a chunk at a time (`dispatch.WORKSPACE`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saert.kernels.encode_chunks import threshold_op, topk_op
from saert.kernels.numerics import HALF, accumulation_dtype
from saert.kernels.operators import refuse_forward_mode
from saert.kernels.screen import Screen


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
        x: [*tokens, d_in], any floating dtype. Where x and W_enc are both half precision,
            x − b_dec is rounded to the dtype of W_enc and the products are of two half-precision
            factors; a wider x is multiplied as it is, with the weights widened.
        W_enc: [num_latents, d_in]; b_enc: [num_latents] or None; b_dec: [d_in], subtracted from x.
        k: slots per token; the width is min(k, competing latents).
        weight: [num_latents], finite, what scores are multiplied by for the ranking alone (decoder
            norms); taken as a constant by the gradient. The values stay plain scores; the GPU
            kernel divides the weight out again, which rounds twice.
        latents: int64 [E], ascending, the only latents that compete (AuxK: the dead ones). The
            gradient reaches their rows of W_enc.
        screen: a half-precision copy of W_enc that finds candidates, for float32 weights where
            half-precision products are much faster; the result is exact with it too
            (`saert.kernels.screen`). Unused on other devices; waits for the device.
        row_sparse: whether the gradient of W_enc is a sparse COO tensor of the touched rows. Not
            inside a compiled graph, which would have to know their number.

    Differentiable in x, W_enc, b_enc and b_dec, through the values, in reverse mode. Works under
    autocast (which does not reach the scores), torch.compile, torch.export and FakeTensor. The
    Triton kernels, for float32 and half precision and k up to 2048, never wait for the device.

    Raises:
        ValueError: shapes or devices that contradict each other, k below 1, latents that are not
            as above, or `screen` together with `weight` or `latents`.
        RuntimeError: forward-mode differentiation.
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
    if latents is not None and (latents.dtype != torch.int64 or latents.dim() != 1):
        hint = "; of a mask take mask.nonzero().squeeze(-1)" if latents.dtype == torch.bool else ""
        raise ValueError(
            f"encode_topk: latents are {latents.dtype} {list(latents.shape)}, expected torch.int64 "
            f"[E]{hint}"
        )
    flat = x.reshape(-1, x.shape[-1])
    found = topk_op(flat, W_enc, b_enc, b_dec, weight, latents, half, bounds, k, row_sparse)
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
    count, at least 1, which depends on the data: this waits for the device. The other arguments
    are those of `encode_topk`.
    """
    _check(x, W_enc, b_enc, b_dec, weight)
    level = torch.as_tensor(threshold, dtype=accumulation_dtype(W_enc.dtype), device=x.device)
    if level.shape not in ((), (W_enc.shape[0],)):
        raise ValueError(
            f"encode_threshold: threshold is {list(level.shape)}, expected a number or "
            f"[{W_enc.shape[0]}], one per latent"
        )
    flat = x.reshape(-1, x.shape[-1])
    return _shaped(threshold_op(flat, W_enc, b_enc, b_dec, level, weight, row_sparse), x)


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
    if weight is not None and latents is not None:
        weight = weight[latents]
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
    wide, halved = accumulation_dtype(W_enc.dtype), x.dtype in HALF and W_enc.dtype in HALF
    x = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
    if latents is not None:
        W_enc, b_enc = W_enc[latents], None if b_enc is None else b_enc[latents]
    if halved:
        x = x.to(W_enc.dtype).to(wide)
    scores = x @ W_enc.to(wide).T
    return scores if b_enc is None else scores + b_enc.to(wide)


def _slots(ranks: Tensor, chosen: Tensor, scores: Tensor, latents: Tensor | None) -> Encoded:
    """Plain scores of the chosen latents; slots that rank at or below zero are unused."""
    used = ranks > 0
    values = torch.where(used, scores.gather(-1, chosen), 0)
    indices = chosen if latents is None else latents[chosen]
    return Encoded(torch.where(used, indices, 0), values, scores.isnan().any(-1))


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
    refuse_forward_mode("encode")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.device != W_enc.device:
            raise ValueError(f"encode: {name} is on {tensor.device}, but W_enc on {W_enc.device}")
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"encode: {name} is {list(tensor.shape)}, expected {list(shape)} for W_enc "
                f"{list(W_enc.shape)}"
            )
