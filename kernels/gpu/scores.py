"""scores[t, i] = ⟨x[t], W[i]⟩ (+ bias[i]), accumulated and left in float32: what a selection reads.

`small_scores` is for a handful of tokens, where reading W once is the whole cost. `large_scores`
is for more, where the matrix product is: cuBLAS on one [tokens, latents] chunk, told to leave its
float32 accumulator alone. Neither rounds a score to the weights' dtype (KERNELS.md section 4).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from saert.kernels.numerics import HALF, no_autocast

# Launch parameters. Fixed, not autotuned: a tuner may change the order of a sum between runs.
SMALL_TOKENS = 16  # the least M of tl.dot, and still far below the ridge of about 184 tokens
ONE_LATENTS, ONE_D = 16, 256  # 4096 partial sums: 32 registers a thread, 8 KB of bf16 in flight
FEW_LATENTS = 64  # 4 warps of 16 columns each
FEW_D_HALF = 128  # 16 KB of W a stage: three stages fit three times into an SM
FEW_D_FLOAT = 32  # float32 products are plain FMAs, whose operands stay in registers
WARPS = 4


@triton.jit
def _one_token(
    x, w, bias, out, n, d, w_stride,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N latents of the only token, as products summed once at the end."""
    latent = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    rows = w + latent.to(tl.int64)[:, None] * w_stride  # [BLOCK_N, 1]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for begin in range(0, d, BLOCK_D):
        inside = begin + column < d
        xs = tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
        mask = (latent < n)[:, None] & inside[None, :]
        ws = tl.load(rows + (begin + column)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += ws * xs[None, :]  # [BLOCK_N, BLOCK_D]
    scores = tl.sum(total, axis=1)  # [BLOCK_N]
    if HAS_BIAS:
        scores += tl.load(bias + latent, mask=latent < n, other=0.0).to(tl.float32)
    tl.store(out + latent, scores, mask=latent < n)


@triton.jit
def _few_tokens(
    x, w, bias, out, tokens, n, d, x_stride, w_stride, out_stride,
    HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N latents of all tokens, one pass over its rows of w, no split of d."""
    token = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    latent = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    x_rows = x + token.to(tl.int64)[:, None] * x_stride  # [BLOCK_T, 1]
    w_rows = w + latent.to(tl.int64)[None, :] * w_stride  # [1, BLOCK_N]
    scores = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for begin in range(0, d, BLOCK_D):
        at = begin + column
        x_mask = (token < tokens)[:, None] & (at < d)[None, :]
        w_mask = (at < d)[:, None] & (latent < n)[None, :]
        xs = tl.load(x_rows + at[None, :], mask=x_mask, other=0.0)  # [BLOCK_T, BLOCK_D]
        ws = tl.load(w_rows + at[:, None], mask=w_mask, other=0.0)  # [BLOCK_D, BLOCK_N]
        if WIDEN:
            xs, ws = xs.to(tl.float32), ws.to(tl.float32)
        scores = tl.dot(xs, ws, scores, input_precision="ieee")
    if HAS_BIAS:
        scores += tl.load(bias + latent, mask=latent < n, other=0.0).to(tl.float32)[None, :]
    target = out + token.to(tl.int64)[:, None] * out_stride + latent[None, :]
    tl.store(target, scores, mask=(token < tokens)[:, None] & (latent < n)[None, :])


def small_scores(x: Tensor, W_enc: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x [T, d] and W_enc [n, d], T <= 16, bias [n] -> out float32 [T, n], returned.

    x has the dtype of W_enc, or is float32: then W_enc is widened on its way.

    Rows may be strided (a slice of a wider workspace), elements of a row may not.
    """
    tokens, d = x.shape
    n = W_enc.shape[0]
    if tokens > SMALL_TOKENS:
        raise ValueError(f"small_scores is for at most {SMALL_TOKENS} tokens, found {tokens}")
    if tokens == 0 or n == 0:
        return out
    if tokens == 1:
        _one_token[(triton.cdiv(n, ONE_LATENTS),)](
            x, W_enc, bias, out, n, d, W_enc.stride(0),
            HAS_BIAS=bias is not None, BLOCK_N=ONE_LATENTS, BLOCK_D=ONE_D, num_warps=WARPS,
        )  # fmt: skip
        return out
    _few_tokens[(triton.cdiv(n, FEW_LATENTS),)](
        x, W_enc, bias, out, tokens, n, d, x.stride(0), W_enc.stride(0), out.stride(0),
        # the interpreter multiplies the raw bits of bfloat16
        HAS_BIAS=bias is not None,
        WIDEN=x.dtype != W_enc.dtype or not isinstance(_few_tokens, triton.JITFunction),
        BLOCK_T=SMALL_TOKENS, BLOCK_N=FEW_LATENTS,
        BLOCK_D=FEW_D_HALF if x.dtype in HALF else FEW_D_FLOAT, num_warps=WARPS,
    )  # fmt: skip
    return out


def large_scores(x: Tensor, W_rows: Tensor, out: Tensor) -> Tensor:
    """x [T, d] and W_rows [n, d] -> out float32 [T, n], rows may be strided; returned.

    x has the dtype of W_rows, or is float32: then W_rows is widened.
    Autocast, TF32 and reductions below float32 are off for the duration and then as they were.
    """
    with torch.no_grad(), no_autocast(x), _full_precision():
        if W_rows.dtype not in HALF:
            return torch.mm(x, W_rows.T, out=out)
        if x.dtype in HALF and _half_to_float32(x.device, x.dtype):
            return torch.mm(x, W_rows.T, out_dtype=torch.float32, out=out)
        return torch.mm(x.float(), W_rows.float().T, out=out)  # a chunk's copy, not W's


@functools.cache
def _half_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.mm takes half-precision factors to a float32 product here (CUDA, torch 2.8)."""
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.zeros(16, 16, device=device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):
        return False
    return True


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Switch off what lets cuBLAS multiply or add below float32; touch only what is switched on."""
    matmul = torch.backends.cuda.matmul
    names = ("fp16_accumulation", "fp16_reduced_precision_reduction")
    flags = [f"allow_{name}" for name in (*names, "bf16_reduced_precision_reduction")]
    on = [flag for flag in flags if getattr(matmul, flag, False)]
    with contextlib.ExitStack() as undo:
        for flag in on:
            setattr(matmul, flag, False)
            undo.callback(setattr, matmul, flag, True)
        _tf32_off(undo)
        yield


def _tf32_off(undo: contextlib.ExitStack) -> None:
    """TF32 has two interfaces, and torch refuses to multiply once a caller has mixed them."""
    matmul = torch.backends.cuda.matmul
    try:
        legacy: bool | None = matmul.allow_tf32
    except RuntimeError:  # switched on through fp32_precision, which only that can switch off
        legacy = None
    if legacy is None:
        undo.callback(_restore_precision, matmul.fp32_precision)
        matmul.fp32_precision = "ieee"
    elif legacy and torch.get_float32_matmul_precision() == "medium":  # allow_tf32 forgets that
        undo.callback(torch.set_float32_matmul_precision, "medium")
        torch.set_float32_matmul_precision("highest")
    elif legacy:
        undo.callback(setattr, matmul, "allow_tf32", True)
        matmul.allow_tf32 = False


def _restore_precision(before: str) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "none"  # inherit from torch.backends.fp32_precision
    if matmul.fp32_precision != before:
        matmul.fp32_precision = before
