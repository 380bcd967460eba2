"""sparse_decode: out[t] = base[t] + bias + Σ_j values[t, j] · W_dec[indices[t, j]].

A dense decoder reads all of W_dec for every token; this reads the k rows that the code names. With
`base` it is an edit: the hidden state plus the differences of the edited latents (DESIGN, the delta
law). `gather_dot[t, j] = ⟨g[t], W[indices[t, j]]⟩` is its gradient with respect to the values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.numerics import accumulation_dtype, no_autocast
from saert.kernels.operators import operator, refuse_forward_mode
from saert.kernels.segments import row_gradient, sparse_row_gradient


def sparse_decode(
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    *,
    row_sparse: bool = False,
) -> Tensor:
    """indices int64 and values [*tokens, k], W_dec [num_latents, d_out] -> [*tokens, d_out].

    Args:
        indices: [*tokens, k], or [k] where all tokens name the same latents (an edit table).
        bias: [d_out]; base: [*tokens, d_out], any floating dtype. Both are added.
        row_sparse: whether the gradient of W_dec is a sparse COO tensor of the touched rows.

    Accumulates in float32 for half-precision weights and returns that; otherwise works in and
    returns the dtype of W_dec, or that of `base` if it is wider. Differentiable in everything but
    the indices, in reverse mode.

    Raises:
        ValueError: shapes that contradict each other.
        RuntimeError: forward-mode differentiation.
    """
    tokens, d_out = values.shape[:-1], W_dec.shape[1]
    _check(indices, values, W_dec, bias, base)
    wide = accumulation_dtype(W_dec.dtype)
    if base is not None and torch.promote_types(base.dtype, wide) != wide:
        # a float64 hidden state keeps its digits where nothing is added
        return base + sparse_decode(indices, values, W_dec, bias, row_sparse=row_sparse)
    shared = indices.dim() == 1
    count, k = math.prod(tokens), values.shape[-1]
    flat = [
        indices if shared else indices.reshape(count, k),
        values.reshape(count, k),
        W_dec,
        bias,
        None if base is None else base.reshape(count, d_out),
    ]
    out: Tensor = _decode_op(*flat, row_sparse)
    return out.reshape(*tokens, d_out)


def sparse_decode_reference(
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """The definition, as one gather: [*tokens, k] twice, [num_latents, d] -> [*tokens, d]."""
    wide = accumulation_dtype(W_dec.dtype)
    out = (values.to(wide).unsqueeze(-1) * W_dec[indices].to(wide)).sum(-2)
    out = out if bias is None else out + bias.to(wide)
    return out if base is None else out + base.to(wide)


def gather_dot_reference(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """⟨g[t], W[indices[t, j]]⟩: [*tokens, d], int64 [*tokens, k] -> [*tokens, k]."""
    wide = accumulation_dtype(W.dtype)
    return (g.to(wide).unsqueeze(-2) * W[indices].to(wide)).sum(-1)


# -- the operators ---------------------------------------------------------------------------------


def _run_decode(
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    row_sparse: bool,
) -> Tensor:
    wide = accumulation_dtype(W_dec.dtype)
    with no_autocast(W_dec):
        values = values.to(wide)
        if _fused(values, W_dec):
            from saert.kernels.gpu import decode as gpu

            indices = indices.expand(values.shape)
            fused: Tensor = gpu.sparse_decode(indices, values, W_dec, bias, base)
            return fused
        if indices.dim() == 1:
            out = values @ W_dec[indices].to(wide)
        else:
            out = _decode(indices, values, W_dec)
        if bias is not None:
            out += bias
        if base is not None:
            out += base
        return out


def _fused(values: Tensor, W_dec: Tensor) -> bool:
    tokens, k = values.shape
    return dispatch.uses_triton(W_dec) and not dispatch.decodes_densely(tokens, k, W_dec)


def _decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    num_latents, d_out = W_dec.shape
    k = values.shape[1]
    if not values.numel():
        return values.new_zeros(len(values), d_out)
    if dispatch.decodes_densely(len(values), k, W_dec):
        pieces = dispatch.pieces(num_latents, indices, values)
        return torch.cat([_dense_decode(i, v, W_dec) for i, v in pieces])
    if values.dtype == W_dec.dtype and W_dec.device.type == "cpu":
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")
    # embedding_bag would accumulate half-precision weights in half precision
    pieces = dispatch.pieces(k * d_out, indices, values)
    return torch.cat([sparse_decode_reference(i, v, W_dec) for i, v in pieces])


def _dense_decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    code = values.new_zeros(len(values), W_dec.shape[0]).scatter_add(1, indices, values)
    if W_dec.dtype == code.dtype:
        return code @ W_dec
    rows = dispatch.WIDENED_ROWS
    pairs = zip(code.split(rows, 1), W_dec.split(rows), strict=True)
    return torch.stack([c @ part.to(c.dtype) for c, part in pairs]).sum(0)


def _decode_fake(
    indices: Tensor, values: Tensor, W_dec: Tensor, bias: Any, base: Any, _: bool
) -> Tensor:
    return values.new_empty(values.shape[0], W_dec.shape[1], dtype=accumulation_dtype(W_dec.dtype))


def gather_dot(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """⟨g[t], W[indices[t, j]]⟩: g [T, d] in the accumulation dtype, int64 [T, k] -> [T, k].

    Not differentiable itself.
    """
    out: Tensor = _gather_dot_op(g, indices, W)
    return out


def _run_gather_dot(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    if not indices.numel():
        return g.new_zeros(indices.shape)
    if dispatch.uses_triton(W):
        from saert.kernels.gpu import decode as gpu

        dots: Tensor = gpu.gather_dot(g, indices, W)
        return dots
    if g.dtype == W.dtype and W.device.type == "cpu":
        return _bag_gather_dot(g, indices, W)
    pieces = dispatch.pieces(indices.shape[1] * W.shape[1], g, indices)
    return torch.cat([gather_dot_reference(rows, i, W) for rows, i in pieces])


def _bag_gather_dot(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """What `embedding_bag` itself calls for the gradient of its per-sample weights."""
    tokens, k = indices.shape
    bags = torch.arange(tokens, device=g.device)
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.contiguous(), W, indices.contiguous().flatten(), bags * k, bags.repeat_interleave(k), 0
    )
    return out.view(tokens, k)


def _gather_dot_fake(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return g.new_empty(indices.shape)


_gather_dot_op = operator(
    "gather_dot(Tensor g, Tensor indices, Tensor W) -> Tensor", _run_gather_dot, _gather_dot_fake
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, values, W_dec, bias, base, ctx.row_sparse = inputs
    ctx.save_for_backward(indices, values, W_dec)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.base_dtype = None if base is None else base.dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    indices, values, W_dec = ctx.saved_tensors
    _, needs_values, needs_W, needs_bias, needs_base, _ = ctx.needs_input_grad
    dvalues = dW = None
    gradient = sparse_row_gradient if ctx.row_sparse else row_gradient
    with no_autocast(g):
        shared = indices.dim() == 1  # then both gradients are small dense products
        if needs_values:
            dots = g @ W_dec[indices].to(g.dtype).T if shared else gather_dot(g, indices, W_dec)
            dvalues = dots.to(values.dtype)
        if needs_W:
            weights, rows = values.to(g.dtype), g
            if shared:
                rows, indices = weights.T @ g, indices.unsqueeze(-1)
                weights = torch.ones_like(indices, dtype=g.dtype)
            dW = gradient(indices, weights, rows, W_dec.shape[0])[0].to(W_dec.dtype)
    dbias = g.sum(0).to(ctx.bias_dtype) if needs_bias else None
    dbase = g.to(ctx.base_dtype) if needs_base else None
    return None, dvalues, dW, dbias, dbase, None


_decode_op = operator(
    "sparse_decode(Tensor indices, Tensor values, Tensor W_dec, Tensor? bias, Tensor? base, "
    "bool row_sparse) -> Tensor",
    _run_decode,
    _decode_fake,
    _backward,
    _save,
)


def _check(
    indices: Tensor, values: Tensor, W_dec: Tensor, bias: Tensor | None, base: Tensor | None
) -> None:
    refuse_forward_mode("sparse_decode")
    shared = indices.dim() == 1 and values.shape[-1:] == indices.shape
    if values.shape != indices.shape and not shared:
        raise ValueError(
            f"sparse_decode: indices are {list(indices.shape)} but values are "
            f"{list(values.shape)}, expected [*tokens, k] twice, or indices [k]"
        )
    d_out = W_dec.shape[1]
    expected = {"bias": (bias, (d_out,)), "base": (base, (*values.shape[:-1], d_out))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"sparse_decode: {name} is {list(tensor.shape)}, expected {list(shape)} for values "
                f"{list(values.shape)} and W_dec {list(W_dec.shape)}"
            )
