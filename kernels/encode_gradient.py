"""The gradient of an encoder: from dL/dvalues of the selected slots to x, W_enc, b_enc and b_dec.

    dx[t]     = Σ_j g[t, j] · W_enc[indices[t, j]]            a decode
    dW_enc[i] = Σ_{(t, j): indices[t, j] = i} g[t, j] · (x[t] − b_dec)
    db_enc[i] = Σ_{(t, j): indices[t, j] = i} g[t, j]
    db_dec    = −Σ_t dx[t] = −db_enc W_enc                    openai/sparse_autoencoder: sum first

with g = dL/dvalues at used slots and 0 elsewhere. Nothing of size [tokens, num_latents] appears.
Half-precision weights may multiply a rounded x − b_dec; the gradient takes it as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.decode import sparse_decode
from saert.kernels.numerics import no_autocast
from saert.kernels.segments import row_gradient, sparse_row_gradient


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, b_enc, b_dec = inputs[:4]
    indices, values, _ = output
    ctx.save_for_backward(x, W_enc, b_enc, b_dec, indices, values)
    ctx.row_sparse, ctx.arguments = inputs[-1], len(inputs)


def backward(ctx: Any, _: Any, grad: Tensor, __: Any) -> tuple[Any, ...]:
    """dL/dscore = dL/dvalue at used slots; everything else follows from the linear layer.

    db_dec = −Σ_t dx[t] = −(Σ_t dL/dscores[t]) W_enc: one product, after the sum over tokens
    (openai/sparse_autoencoder).
    """
    x, W_enc, b_enc, b_dec, indices, values = ctx.saved_tensors
    needs_x, needs_W, needs_b_enc, needs_b_dec = ctx.needs_input_grad[:4]
    num_latents, wide = W_enc.shape[0], values.dtype
    with no_autocast(x):
        g = torch.where(values > 0, grad, 0)
        dx = dW = db_enc = db_dec = None
        if needs_x:
            dx = sparse_decode(indices, g, W_enc)
        if needs_W or needs_b_enc or (needs_b_dec and not needs_x):
            rows = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
            if ctx.row_sparse and needs_W:
                dW, sums = sparse_row_gradient(indices, g, rows, num_latents)
            else:
                dW, sums = row_gradient(indices, g, rows if needs_W else rows[:, :0], num_latents)
            db_enc = sums if needs_b_enc else None
            if needs_b_dec and not needs_x:
                db_dec = -_times(sums, W_enc)
        if needs_b_dec and dx is not None:
            db_dec = -dx.sum(0)
        grads = (dx, dW if needs_W else None, db_enc, db_dec)
        owners = (x, W_enc, b_enc, b_dec)
        cast = [None if g is None else g.to(o.dtype) for g, o in zip(grads, owners, strict=True)]
    return (*cast, *[None] * (ctx.arguments - 4))


def _times(sums: Tensor, W: Tensor) -> Tensor:
    """sums [n] @ W [n, d], the products in the dtype of the sums."""
    if W.dtype == sums.dtype:
        return sums @ W
    rows = dispatch.WIDENED_ROWS
    pairs = zip(sums.split(rows), W.split(rows), strict=True)
    return torch.stack([s @ part.to(s.dtype) for s, part in pairs]).sum(0)
