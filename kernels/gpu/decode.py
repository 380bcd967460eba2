"""sparse_decode: out[t] = base[t] + bias + Σ_j values[t, j] · W_dec[indices[t, j]].

One program per token and block of columns. It takes the named rows eight at a time, adds slot j to
the float32 accumulator j mod 8, and the accumulators to each other at the end. bias and base are
added to the finished sum, so an edit of nothing gives base back.
`gather_dot[t, j] = ⟨g[t], W[indices[t, j]]⟩`: one program per token and eight slots, which share
one read of g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch parameters. Fixed, not tuned at run time: tuning may change the order of a reduction.
SLOTS = 8  # rows under way at once in a program: two a warp, or what memory's latency asks for
COLUMNS = 256  # of each: 16 bytes a thread in half precision; 8 × 256 sums are 16 registers
WARPS = 4


def sparse_decode(
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """indices int64 and values float32 [T, k], W_dec [num_latents, d] -> float32 [T, d].

    Args:
        W_dec: float32, bfloat16 or float16, accumulated in float32.
        bias: [d]; base: [T, d], both of any floating dtype.

    A slot of value 0 is not looked up: its index may be anything, and a NaN in a row it names stays
    there. Shapes are the caller's business (`kernels/decode.py`).
    """
    (tokens, k), d = indices.shape, W_dec.shape[1]
    out = values.new_empty(tokens, d, dtype=torch.float32)
    if not out.numel():
        return out
    W_dec = _with_contiguous_rows(W_dec)
    block = _block(d)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _decode_kernel[(tokens, triton.cdiv(d, block))](
            out,
            indices.contiguous(),
            values.to(torch.float32).contiguous(),
            W_dec,
            None if bias is None else bias.contiguous(),
            None if base is None else base.contiguous(),
            d,
            W_dec.stride(0),
            k,
            SLOTS=SLOTS,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out


def gather_dot(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """g float32 [T, d], indices int64 [T, k], W [num_latents, d] -> float32 [T, k].

    Every index must be in range, those of unused slots too.
    """
    (tokens, k), d = indices.shape, W.shape[1]
    out = g.new_empty(tokens, k, dtype=torch.float32)
    if not out.numel():
        return out
    W = _with_contiguous_rows(W)
    with torch.cuda.device_of(out):
        _gather_dot_kernel[(tokens, triton.cdiv(k, SLOTS))](
            out,
            g.contiguous(),
            indices.contiguous(),
            W,
            d,
            W.stride(0),
            k,
            SLOTS=SLOTS,
            BLOCK=_block(d),
            num_warps=WARPS,
        )
    return out


# `k` is not specialised: codes come with every k, and for k = 1 Triton would make it a constant.
@triton.jit(do_not_specialize=["k"])
def _decode_kernel(
    out, indices, values, W_dec, bias, base, d, pitch, k, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < d
    acc = tl.zeros([SLOTS, BLOCK], tl.float32)  # [SLOTS, BLOCK]
    for first in range(0, k, SLOTS):
        slot = first + tl.arange(0, SLOTS)  # [SLOTS]
        i = tl.load(indices + t * k + slot, mask=slot < k, other=0)  # [SLOTS]
        v = tl.load(values + t * k + slot, mask=slot < k, other=0.0)  # [SLOTS]
        wanted = (v != 0.0)[:, None] & inside[None, :]  # [SLOTS, BLOCK]
        rows = tl.load(W_dec + i[:, None] * pitch + column[None, :], mask=wanted, other=0.0)
        acc += v[:, None] * rows.to(tl.float32)
    total = tl.sum(acc, 0)  # [BLOCK]
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if base is not None:
        total += tl.load(base + t * d + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * d + column, total, mask=inside)


@triton.jit(do_not_specialize=["k"])
def _gather_dot_kernel(out, g, indices, W, d, pitch, k, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)  # [SLOTS]
    i = tl.load(indices + t * k + slot, mask=slot < k, other=0)  # [SLOTS]
    acc = tl.zeros([SLOTS, BLOCK], tl.float32)  # [SLOTS, BLOCK]
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = column < d
        mine = tl.load(g + t * d + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        wanted = (slot < k)[:, None] & inside[None, :]  # [SLOTS, BLOCK]
        rows = tl.load(W + i[:, None] * pitch + column[None, :], mask=wanted, other=0.0)
        acc += rows.to(tl.float32) * mine[None, :]
    tl.store(out + t * k + slot, tl.sum(acc, 1), mask=slot < k)


def _block(d: int) -> int:
    """Columns per program: a power of two, no more than d needs, no fewer than a warp has lanes."""
    return int(min(COLUMNS, max(32, triton.next_power_of_2(d))))


def _with_contiguous_rows(W: Tensor) -> Tensor:
    """W itself unless its columns are strided: a slice of a dictionary is read where it lies."""
    return W if W.stride(1) == 1 else W.contiguous()
