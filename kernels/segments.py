"""row_gradient: dW[i] = Σ_{(t, j): indices[t, j] = i} coefficients[t, j] · rows[t].

The gradient of a dictionary, for decoder (values, dL/dx̂) and encoder (dL/dvalues, x − b_dec)
alike. Only rows that a code names are touched. The pairs are sorted by latent once, then each run
of equal latents is summed in token order: no float atomics, so the same bits at every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.operators import operator


def row_gradient_reference(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """The definition: see `row_gradient`."""
    dense = coefficients.new_zeros(indices.shape[0], num_latents)
    dense = dense.scatter_add(-1, indices, coefficients)
    return dense.T @ rows.to(dense.dtype), dense.sum(0)


def row_gradient(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """indices int64, coefficients [T, k], rows [T, d] -> [num_latents, d], [num_latents].

    In the dtype of the coefficients. The second result is Σ coefficients per latent, the gradient
    of a bias. Not differentiable itself.
    """
    dW, sums = _row_gradient_op(indices, coefficients, rows, num_latents)
    return dW, sums


def _run(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    if dispatch.uses_triton(coefficients):
        from saert.kernels.gpu import segments as gpu

        dW, sums = gpu.row_gradient(indices, coefficients, rows, num_latents)
        return dW, sums
    latents, tokens, weights = _sorted_pairs(indices, coefficients)
    counts = torch.bincount(latents, minlength=num_latents)
    sums = weights.new_zeros(num_latents).index_add_(0, latents, weights)
    return _sum_runs(tokens, weights, rows, counts), sums


def _fake(
    indices: Tensor, coefficients: Tensor, rows: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    dW = coefficients.new_empty(num_latents, rows.shape[1])
    return dW, coefficients.new_empty(num_latents)


_row_gradient_op = operator(
    "row_gradient(Tensor indices, Tensor coefficients, Tensor rows, SymInt num_latents) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)


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
    latents, tokens, weights = _sorted_pairs(indices, coefficients)
    ids, run, counts = latents.unique_consecutive(return_inverse=True, return_counts=True)
    sums = weights.new_zeros(len(ids)).index_add_(0, run, weights)
    return ids, _sum_runs(tokens, weights, rows, counts), sums


def _sorted_pairs(indices: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, token and coefficient of every non-zero pair, by latent and then by token."""
    flat = coefficients.flatten()
    pairs = flat.nonzero().squeeze(-1)
    latents, order = indices.flatten()[pairs].sort(stable=True)
    pairs = pairs[order]
    return latents, pairs // indices.shape[1], flat[pairs]


def _sum_runs(tokens: Tensor, weights: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Σ weights · rows[tokens] over consecutive runs of `counts` pairs: [runs, d]."""
    if not len(tokens) or not rows.shape[1]:
        return weights.new_zeros(len(counts), rows.shape[1])
    starts = counts.cumsum(0) - counts
    rows = rows.to(weights.dtype)
    return F.embedding_bag(tokens, rows, starts, mode="sum", per_sample_weights=weights)
