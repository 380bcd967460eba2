"""linear_scores: scores[t, i] = ⟨x[t], W_enc[i]⟩ + b_enc[i], never rounded below float32.

A top-k or a threshold compares scores that differ in the last digits, so this is the one linear
layer that may not follow its weights into bfloat16: half-precision weights keep half-precision
products, and are accumulated and returned in float32 (KERNELS numerics contract).
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_ROWS = 4096  # a half-precision matrix is widened this many rows at a time, to bound the copy


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half-precision weights, otherwise the weights' own dtype."""
    return torch.float32 if dtype in HALF else dtype


def linear_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """x [*tokens, d_in], W_enc [num_latents, d_in], b_enc [num_latents] -> [*tokens, num_latents].

    The result is float32 for half-precision weights, otherwise the dtype of the weights.
    Autocast is switched off inside: it would round the scores before the selection.
    """
    wide = accumulation_dtype(W_enc.dtype)
    with no_autocast(x):
        x = x.to(W_enc.dtype).to(wide)
        bias = None if b_enc is None else b_enc.to(wide)
        if wide == W_enc.dtype:
            return F.linear(x, W_enc, bias)
        scores = torch.cat([F.linear(x, rows.to(wide)) for rows in W_enc.split(_ROWS)], -1)
        return scores if bias is None else scores + bias


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on x's device; free where autocast is off already."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
