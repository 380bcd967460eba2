"""sparse_decode: out[t] = Σ_j values[t, j] · W_dec[indices[t, j]].

A dense decoder reads all of W_dec for every token; this reads the k rows that the code names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saert.kernels.encode import accumulation_dtype, no_autocast

_GATHERED = 1 << 22  # elements of gathered half-precision rows held at a time


def sparse_decode_reference(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """The definition, as one gather: [*tokens, k] twice, [num_latents, d] -> [*tokens, d]."""
    return (values.unsqueeze(-1) * W_dec[indices]).sum(-2)


def sparse_decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """indices int64 and values [*tokens, k], W_dec [num_latents, d_out] -> [*tokens, d_out].

    Accumulates in float32 for half-precision weights and returns that; otherwise works in and
    returns the dtype of W_dec. Differentiable in `values` and `W_dec`.
    """
    wide = accumulation_dtype(W_dec.dtype)
    lead = indices.shape[:-1]
    flat, weights = indices.reshape(-1, indices.shape[-1]), values.reshape(-1, values.shape[-1])
    if flat.numel() == 0:
        return W_dec.new_zeros(*lead, W_dec.shape[1], dtype=wide)
    with no_autocast(W_dec):
        if wide == W_dec.dtype:
            out = F.embedding_bag(flat, W_dec, per_sample_weights=weights.to(wide), mode="sum")
        else:  # embedding_bag would accumulate in half precision
            out = _gather_decode(flat, weights.to(wide), W_dec)
    return out.reshape(*lead, W_dec.shape[1])


def _gather_decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    step = max(1, _GATHERED // (indices.shape[1] * W_dec.shape[1]))
    pairs = zip(indices.split(step), values.split(step), strict=True)
    return torch.cat([sparse_decode_reference(i, v, W_dec) for i, v in pairs])
