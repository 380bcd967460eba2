"""coordinate_descent: min ½ y'Gy − c'y over y ≥ 0, one program per token, one launch per batch.

y and r = c − Gy live in registers. For each coordinate in turn the program takes the step to
max(0, y_j + r_j), exact because G_jj = 1, and subtracts that step times row j of G from r; the rows
come from L1 or L2. After a sweep the longest step that is still wanted decides whether to go on, so
each token stops on its own. The twin in plain PyTorch is `saert.kernels.refine`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch parameters. A coordinate is one chain of row load, sum over lanes and update: one warp sums
# by shuffles alone, and many tokens per multiprocessor hide the latency. Wide codes need registers.
WARP_SLOTS = 512  # slots up to which one warp serves a token: 16 a lane
WIDE_WARPS = 4


def coordinate_descent(
    gram: Tensor, linear: Tensor, start: Tensor, max_steps: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gram float32 [T, k, k] with diagonal 1 or zero rows, linear and start float32 [T, k] ->
    y float32 [T, k], violation float32 [T], int64 sweeps [T]; see `saert.kernels.refine`."""
    tokens, k = start.shape
    solution = torch.empty_like(start, memory_format=torch.contiguous_format)
    residual = start.new_zeros(tokens)
    steps = torch.zeros(tokens, dtype=torch.int64, device=start.device)
    if not start.numel():
        return solution, residual, steps
    block = max(32, triton.next_power_of_2(k))
    with torch.cuda.device_of(start):  # Triton launches on the current device
        _descent_kernel[(tokens,)](
            solution,
            residual,
            steps,
            gram.contiguous(),
            linear.contiguous(),
            start.contiguous(),
            k,
            max_steps,
            float(tol),
            BLOCK=block,
            num_warps=1 if block <= WARP_SLOTS else WIDE_WARPS,
        )
    return solution, residual, steps


# Not specialised: for 1 Triton would make them constants, and each k a kernel of its own.
@triton.jit(do_not_specialize=["k", "max_steps"])
def _descent_kernel(
    solution, residual, steps, gram, linear, start, k, max_steps, tol, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)  # [BLOCK]
    inside = slot < k
    y = tl.load(start + t * k + slot, mask=inside, other=0.0)  # [BLOCK]
    r = tl.load(linear + t * k + slot, mask=inside, other=0.0)  # [BLOCK]
    for j in range(0, k):
        row = tl.load(gram + (t * k + j) * k + slot, mask=inside, other=0.0)  # [BLOCK]
        r -= tl.load(start + t * k + j) * row
    left = tl.max(tl.abs(y - tl.maximum(y + r, 0.0)), 0)
    step = tl.full((), 0, tl.int32)
    while (step < max_steps) & (left > tol):
        for j in range(0, k):
            row = tl.load(gram + (t * k + j) * k + slot, mask=inside, other=0.0)
            fresh = tl.maximum(y + r, 0.0)
            delta = tl.sum(tl.where(slot == j, fresh - y, 0.0), 0)
            y = tl.where(slot == j, fresh, y)
            r -= delta * row
        if step == 0:  # a start that is far off leaves its rounding errors in r
            r = tl.load(linear + t * k + slot, mask=inside, other=0.0)
            for j in range(0, k):
                row = tl.load(gram + (t * k + j) * k + slot, mask=inside, other=0.0)
                r -= tl.sum(tl.where(slot == j, y, 0.0), 0) * row
        left = tl.max(tl.abs(y - tl.maximum(y + r, 0.0)), 0)
        step += 1
    tl.store(solution + t * k + slot, y, mask=inside)
    tl.store(residual + t, left)
    tl.store(steps + t, step.to(tl.int64))
