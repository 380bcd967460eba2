"""row_gradient: dW[i] = Σ_{(t, j): indices[t, j] = i} coefficients[t, j] · rows[t].

The gradient of a dictionary, for decoder (values, dL/dx̂) and encoder (dL/dvalues, x − b_dec)
alike. Only rows that a code names are touched. The pairs are sorted by latent once, then each run
of equal latents is summed in token order: no float atomics, so the same bits at every run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saert.kernels import dispatch


def row_gradient_reference(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """The definition: see `row_gradient`."""
    dense = coefficients.new_zeros(indices.shape[0], num_latents)
    dense = dense.scatter_add(-1, indices, coefficients)
    return dense.T @ rows.to(dense.dtype), dense.sum(0)


@torch.library.custom_op(
    "saert::row_gradient",
    mutates_args=(),
    schema="(Tensor indices, Tensor coefficients, Tensor rows, SymInt num_latents) "
    "-> (Tensor, Tensor)",
)
def row_gradient(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """indices int64, coefficients [T, k], rows [T, d] -> [num_latents, d], [num_latents].

    In the dtype of the coefficients. The second result is Σ coefficients per latent, the gradient
    of a bias. Not differentiable itself.
    """
    if dispatch.uses_triton(coefficients) and rows.shape[1]:
        from saert.kernels.gpu import segments as gpu

        dW, sums = gpu.row_gradient(indices, coefficients, rows, num_latents)
        return dW, sums
    latents, dW_rows, sums_rows = _touched(indices, coefficients, rows)
    dW = coefficients.new_zeros(num_latents, rows.shape[1])
    sums = coefficients.new_zeros(num_latents)
    dW[latents], sums[latents] = dW_rows, sums_rows
    return dW, sums


@row_gradient.register_fake
def _(indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int) -> Any:
    dW = coefficients.new_empty(num_latents, rows.shape[1])
    return dW, coefficients.new_empty(num_latents)


def sparse_row_gradient(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """`row_gradient` with dW as a coalesced sparse COO tensor: the touched rows, for an optimiser
    that updates nothing else (`torch.optim.SparseAdam`). Its size waits for the device."""
    if dispatch.uses_triton(coefficients):
        from saert.kernels.gpu import segments as gpu

        latents, dW_rows, sums_rows = gpu.touched_rows(indices, coefficients, rows)
    else:
        latents, dW_rows, sums_rows = _touched(indices, coefficients, rows)
    size = (num_latents, rows.shape[1])
    dW = torch.sparse_coo_tensor(
        latents.unsqueeze(0), dW_rows, size, is_coalesced=True, check_invariants=False
    )
    sums = coefficients.new_zeros(num_latents)
    sums[latents] = sums_rows
    return dW, sums


def _touched(indices: Tensor, coefficients: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents with a non-zero coefficient, ascending, their summed rows and coefficients."""
    pairs = coefficients.flatten().nonzero().squeeze(-1)
    latents, order = indices.flatten()[pairs].sort(stable=True)
    pairs = pairs[order]
    weights = coefficients.flatten()[pairs]
    ids, counts = latents.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    run = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
    sums = weights.new_zeros(len(ids)).index_add_(0, run, weights)
    if not len(ids) or not rows.shape[1]:
        return ids, rows.new_zeros(len(ids), rows.shape[1]), sums
    tokens = pairs // indices.shape[1]
    summed = F.embedding_bag(  # a bag per latent: the tokens it fired on, in order
        tokens, rows.to(weights.dtype), starts, mode="sum", per_sample_weights=weights
    )
    return ids, summed, sums
