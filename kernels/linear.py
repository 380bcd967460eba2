"""linear_scores: scores[t, i] = ⟨x[t], W_enc[i]⟩ + b_enc[i], never rounded below float32.

The one linear layer that may not follow its weights into bfloat16. `linear_scores` is dense and
differentiable; `chunk_scores` is what the encoders call on a few tokens, and may use oneDNN where
that is faster than the BLAS behind `F.linear` (MKL on AMD processors: KERNELS.md section 7).
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.numerics import HALF, accumulation_dtype, no_autocast


def linear_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """x [*tokens, d_in], W_enc [num_latents, d_in], b_enc [num_latents] -> [*tokens, num_latents].

    The result is float32 for half-precision weights, otherwise the dtype of the weights. x is
    multiplied as it is: one that should be rounded with its weights comes rounded.
    Autocast is switched off inside: it would round the scores before the selection.
    """
    wide = accumulation_dtype(W_enc.dtype)
    with no_autocast(x):
        x = x.to(wide)
        bias = None if b_enc is None else b_enc.to(wide)
        if wide == W_enc.dtype:
            return F.linear(x, W_enc, bias)
        scores = torch.cat(
            [F.linear(x, rows.to(wide)) for rows in W_enc.split(dispatch.WIDENED_ROWS)], -1
        )
        return scores if bias is None else scores + bias


def chunk_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """`linear_scores` of a few tokens [T, d_in], by the faster product: no gradient here.

    In float32 even where `torch.set_float32_matmul_precision` allows less.
    """
    with _highest_precision():
        return _product(x, W_enc, b_enc)


def _product(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    if len(x) and dispatch.uses_onednn(x, W_enc):
        x, W_enc = x.contiguous(), W_enc.contiguous()
        if not dispatch.exchanges(len(x)):
            return dispatch.onednn_linear(x, W_enc, b_enc)
        scores = dispatch.onednn_linear(W_enc, x, None).t().contiguous()
        return scores if b_enc is None else scores.add_(b_enc)
    if x.dtype == W_enc.dtype and x.dtype not in HALF:
        return F.linear(x, W_enc, b_enc)
    return linear_scores(x, W_enc, b_enc)


@contextlib.contextmanager
def _highest_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
