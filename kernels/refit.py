"""refit: `refine` for the tokens too that coordinate descent alone leaves unfinished.

Where a token's slots outnumber the dimensions that they span, directions nearly cancel each other
and coordinate descent creeps: through thousands of sweeps for a random dictionary with twice as
many active latents as dimensions. After `PATIENCE` sweeps such tokens go on in float64 with the
active-set method of Lawson and Hanson (1974, chapter 23), from where the sweeps have come to. With
F the free slots and r = c − G y (notation of `coordinate_descent`), a step is

    δ_F = (G_FF + ε·I)⁻¹ r_F,    y ← y + α δ,    α ≤ 1 as far as y stays ≥ 0;

where α < 1 the slot that stopped it leaves F, where α = 1 the one with the largest r joins. The
objective never rises. The sweeps have found nearly all of F, so that a few steps remain.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from saert.kernels.numerics import accumulation_dtype, no_autocast
from saert.kernels.operators import operator
from saert.kernels.refine import WORKSPACE, Refined, nnls

PATIENCE = 20
RIDGE = 1e-10
"""ε: G is singular where F outnumbers the dimensions. Its diagonal is 1."""


def refit(
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    target: Tensor,
    max_steps: int,
    tol: float,
) -> Refined:
    """`saert.kernels.refine.refine` unchecked, for the same arguments.

    `steps` counts sweeps and active-set steps alike. Not differentiable: a backward pass through
    the values raises RuntimeError.
    """
    tokens, k = values.shape[:-1], values.shape[-1]
    flat = (indices.reshape(tokens.numel(), k), values.reshape(tokens.numel(), k), W_dec)
    t = target.reshape(tokens.numel(), W_dec.shape[1])
    refined, residual, steps = _refit(*flat, t, max_steps, tol)
    return Refined(refined.reshape(values.shape), residual.reshape(tokens), steps.reshape(tokens))


def _run(
    indices: Tensor, values: Tensor, W_dec: Tensor, target: Tensor, max_steps: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    # a device without float64 keeps to sweeps
    first = max_steps if W_dec.device.type == "mps" else min(max_steps, PATIENCE)
    refined, residual, steps = nnls(indices, values, W_dec, target, first, tol)
    left = (residual > tol).nonzero().squeeze(-1)
    with no_autocast(W_dec):
        batch = max(
            1, WORKSPACE // max(1, values.shape[1] * (values.shape[1] + W_dec.shape[1]) * 8)
        )
        for part in left.split(batch) if max_steps > first else ():
            solved, rest, more = _finish(
                indices[part], values[part] > 0, refined[part], W_dec, target[part],
                max_steps - first, tol,
            )  # fmt: skip
            refined[part] = solved.to(refined.dtype)
            residual[part], steps[part] = rest.to(residual.dtype), steps[part] + more
    return refined, residual, steps


def _finish(
    indices: Tensor,
    used: Tensor,
    z: Tensor,
    W_dec: Tensor,
    target: Tensor,
    max_steps: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The active-set method for T tokens, indices, used and z [T, k]: unit directions, a unit
    target, and back."""
    rows = W_dec[indices.where(used, 0)].double()  # [T, k, d]
    norms = rows.norm(dim=-1)
    used = used & (norms != 0)
    norms = norms.where(used, 1)
    rows *= (used / norms).unsqueeze(-1)
    target, z = target.double(), z.double()
    scale = target.norm(dim=-1, keepdim=True)  # not 0: such a token is done
    linear = torch.bmm(rows, (target / scale).unsqueeze(-1)).squeeze(-1)
    start = torch.where(used, z * norms / scale, 0)
    y, residual, steps = active_set(torch.bmm(rows, rows.mT), linear, start, max_steps, tol)
    return torch.where(used, y * scale / norms, z), residual, steps


def active_set(
    gram: Tensor, linear: Tensor, start: Tensor, max_steps: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `coordinate_descent` computes, by the active-set method; rows of `gram` may be zero."""
    solution, residual = start.clone(), start.new_empty(len(start))
    steps = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    y, r, free = start, linear - _times(gram, start), start > 0
    live = torch.arange(len(start), device=start.device)
    for step in range(max_steps + 1):
        left = (y - (y + r).clamp_min(0)).abs().amax(-1)
        solution[live], residual[live], steps[live] = y, left, step
        going = (left > tol).nonzero().squeeze(-1)
        if step == max_steps or not len(going):
            break
        if len(going) < len(live):
            live, y, r, free = live[going], y[going], r[going], free[going]
            gram, linear = gram[going], linear[going]
        delta = _solve(gram, r, free)
        reach, stops = torch.where(free & (delta < 0), -y / delta, torch.inf).min(-1, keepdim=True)
        # at most one of the two changes: free only those whose step was not cut short
        free = free.scatter(-1, stops, free.gather(-1, stops) & (reach >= 1))
        y = torch.where(free, y + reach.clamp_max(1) * delta, 0).clamp_min(0)
        r = linear - _times(gram, y)
        pull, joins = r.masked_fill(free, -torch.inf).max(-1, keepdim=True)
        free = free.scatter(-1, joins, free.gather(-1, joins) | ((reach >= 1) & (pull > 0)))
    return solution, residual, steps


def _solve(gram: Tensor, r: Tensor, free: Tensor) -> Tensor:
    """(G_FF + ε·I)⁻¹ r_F, and 0 outside F."""
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    curvature = torch.where(both, gram, 0)
    curvature.diagonal(dim1=-2, dim2=-1).add_(torch.where(free, RIDGE, 1.0))
    factor = torch.linalg.cholesky_ex(curvature).L
    return torch.cholesky_solve(torch.where(free, r, 0).unsqueeze(-1), factor).squeeze(-1)


def _times(gram: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(gram, y.unsqueeze(-1)).squeeze(-1)


# -- the operator ----------------------------------------------------------------------------------


def _fake(
    indices: Tensor, values: Tensor, W_dec: Tensor, target: Tensor, max_steps: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(W_dec.dtype)
    residual = values.new_empty(values.shape[0], dtype=wide)
    return values.new_empty(values.shape, dtype=wide), residual, residual.to(torch.int64)


def _no_gradient(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "refined activations are not differentiable: call refine, or a model with "
        "attach(…, refine=True), under torch.no_grad(), or train without refine"
    )


_refit = operator(
    "refit(Tensor indices, Tensor values, Tensor W_dec, Tensor target, int max_steps, float tol) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _no_gradient,
)
