"""The gate before the clock: is what a kernel returns right?

A check gets inputs that are not the timed ones and the kernel's result on all of them; it compares
a sample of tokens (of latents, for a dictionary's gradient) with float64. The contract is
KERNELS.md section 4: a selected score lies at most ε below the k-th largest, an unselected one at
most ε above it; values are at most twice as far from float64 as plain PyTorch's are in float32,
give or take ROUNDINGS units in the last place of the largest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._inputs import Inputs, centred

SAMPLE = 16
"""Tokens that a check looks at."""

TOLERANCE = 1e-4
"""How far from its optimum `refine` may leave a slot, in its own units: its default."""

EPSILON = torch.finfo(torch.float32).eps
ROUNDINGS = 16
"""Plain PyTorch may hit a few numbers by luck, and oneDNN adds in another order than MKL: its
scores are 3 times as far off at d_in 768 (AVX2; root mean square 1.2e-6 against 3.8e-7)."""

ROWS = 8192  # of a dictionary that exist in float64 at a time


class CheckRed(Exception):
    """How a result differs from its reference."""


def check_topk(i: Inputs, found: Any) -> None:
    """`encode_topk`."""
    tokens, scores = sampled(i), exact_scores(i, sampled(i))
    bar = scores.relu().topk(i.shape.k).values[:, -1:]
    _check_selection(i, found, scores, bar)
    positive = (scores > _rounding(i, tokens, scores)).sum(-1).clamp(max=i.shape.k)
    if not bool(((found[1][tokens] > 0).sum(-1) >= positive).all()):
        raise CheckRed("slots are empty though scores are positive")


def check_threshold(i: Inputs, found: Any) -> None:
    """`encode_threshold`."""
    scores = exact_scores(i, sampled(i))
    _check_selection(i, found, scores, torch.full_like(scores[:, :1], i.threshold))


def check_decode(i: Inputs, found: Tensor) -> None:
    """`sparse_decode` of the inputs' code."""
    t = sampled(i)
    plain, exact = (_decoded(i, i.indices[t], i.values[t], kind) for kind in PRECISIONS)
    within_twice("reconstructions", found[t], plain, exact)


def check_inference(i: Inputs, found: Tensor) -> None:
    """A reconstruction of x."""
    tokens, scores = clear_tokens(i)
    best = scores.relu().topk(i.shape.k)
    exact = _decoded(i, best.indices, best.values, torch.float64)
    values = _float32_scores(i, tokens).gather(1, best.indices).relu()
    plain = _decoded(i, best.indices, values, torch.float32)
    within_twice("reconstructions", found[tokens], plain, exact)


def check_gather_dot(i: Inputs, found: Tensor) -> None:
    """`gather_dot` of g with the rows of W_dec that the code names."""
    t = sampled(i)
    rows, g = i.W_dec[i.indices[t]], i.g[t].unsqueeze(-1)
    plain, exact = ((rows.to(kind) @ g.to(kind)).squeeze(-1) for kind in PRECISIONS)
    within_twice("dots", found[t], plain, exact)


def check_row_gradient(i: Inputs, found: Any) -> None:
    """`row_gradient`: the hottest latent, the last, some between, and the sum over all."""
    dW, sums = found
    hot = i.indices.flatten().mode().values.view(1)
    some = torch.linspace(0, i.shape.n - 1, SAMPLE, device=hot.device).long()
    latents = torch.cat([hot, some, i.indices[0]])
    named = torch.stack([torch.where(i.indices == one, i.values, 0).sum(1) for one in latents])
    plain, exact = (named.to(kind) @ i.g.to(kind) for kind in PRECISIONS)
    within_twice("rows of dW", dW[latents], plain, exact)
    within_twice("sums", sums[latents], named.sum(1), named.double().sum(1))
    total = i.values.double().sum(1) @ i.g.double()
    slack = 4 * EPSILON * float(i.values.sum(1) @ i.g.abs().amax(1))
    if not float((dW.sum(0, dtype=torch.float64) - total).abs().max()) <= slack:
        raise CheckRed("dW does not add up over its latents")


def check_refine(i: Inputs, found: Any) -> None:
    """The Karush-Kuhn-Tucker conditions in float64, and never worse than the start."""
    t = sampled(i)
    rows, target = i.W_dec[i.indices[t]].double(), i.target[t].double()
    scale, norms = target.norm(dim=-1, keepdim=True), rows.norm(dim=-1)

    def error(z: Tensor) -> Tensor:
        return (target - (z.double().unsqueeze(1) @ rows).squeeze(1)) / scale

    z = found.values[t]
    y = z * norms / scale
    slope = (rows @ error(z).unsqueeze(-1)).squeeze(-1) / norms
    left = float((y - (y + slope).clamp_min(0)).abs().max())
    if not left <= TOLERANCE + 1e-5:  # it stops by float32's own measure of this
        raise CheckRed(f"a slot is {left:.1e} from its optimum, allowed {TOLERANCE:.1e}")
    if not bool((error(z).norm(dim=-1) <= error(i.start[t]).norm(dim=-1) + 1e-6).all()):
        raise CheckRed("a token is worse than at the start")


# -- what the checks share -------------------------------------------------------------------------

PRECISIONS = (torch.float32, torch.float64)


def sampled(i: Inputs) -> Tensor:
    """Tokens that a check looks at, the first and the last among them."""
    last = len(i.x) - 1
    return torch.linspace(0, last, min(last + 1, SAMPLE), device=i.x.device).long().unique()


def exact_scores(i: Inputs, tokens: Tensor) -> Tensor:
    """Scores [tokens, n] in float64, of the input as half-precision weights round it."""
    x = i.x[tokens].double() - i.b_dec.double()
    if i.W_enc.dtype != torch.float32:
        x = centred(i)[tokens].double()
    return _scores(i, x)


def clear_tokens(i: Inputs) -> tuple[Tensor, Tensor]:
    """Sampled tokens whose k-th and next score differ by more than rounding, and their scores."""
    tokens = sampled(i)
    scores = exact_scores(i, tokens)
    best = scores.topk(i.shape.k + 1).values
    clear = best[:, -2] - best[:, -1] > 2 * _rounding(i, tokens, scores)
    return tokens[clear], scores[clear]


def within_twice(what: str, found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raise CheckRed unless `found` is at most twice as far from `exact` as `plain` is."""
    if found.shape != exact.shape:
        raise CheckRed(f"{what} are {list(found.shape)}, expected {list(exact.shape)}")
    if not exact.numel():
        return
    error = float((found.double() - exact).abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max())
    allowed += ROUNDINGS * EPSILON * float(exact.abs().max())
    if not error <= allowed:
        raise CheckRed(f"{what} are off by {error:.1e}, allowed {allowed:.1e}")


def _check_selection(i: Inputs, found: Any, scores: Tensor, bar: Tensor) -> None:
    """`bar` [tokens, 1] is what a selected score has to reach and no other may exceed."""
    tokens = sampled(i)
    eps = _rounding(i, tokens, scores)
    indices, values = found[0][tokens], found[1][tokens].double()
    used = values > 0
    chosen = scores.gather(1, indices)
    count = torch.zeros_like(scores).scatter_add_(1, indices, used.double())
    if bool((count > 1).any()):
        raise CheckRed("a latent is selected twice")
    if not bool((chosen >= bar - eps)[used].all()):
        raise CheckRed("a selected score is too small")
    if not bool((scores.masked_fill(count > 0, -math.inf) <= bar + eps).all()):
        raise CheckRed("a larger score is not selected")
    if not bool((values[:, :-1] >= values[:, 1:]).all()):
        raise CheckRed("values are not in descending order")
    plain = _float32_scores(i, tokens).gather(1, indices)
    within_twice("values", values[used], plain[used], chosen[used])


def _rounding(i: Inputs, tokens: Tensor, scores: Tensor) -> Tensor:
    """ε: twice the largest error of plain float32 scores."""
    return 2 * (_float32_scores(i, tokens) - scores).abs().max()


def _float32_scores(i: Inputs, tokens: Tensor) -> Tensor:
    return _scores(i, centred(i)[tokens].float()).double()


def _scores(i: Inputs, x: Tensor) -> Tensor:
    parts = [F.linear(x, rows.to(x.dtype)) for rows in i.W_enc.split(ROWS)]
    return torch.cat(parts, -1) + i.b_enc.to(x.dtype)


def _decoded(i: Inputs, indices: Tensor, values: Tensor, kind: torch.dtype) -> Tensor:
    rows = i.W_dec[indices].to(kind)
    return (values.to(kind).unsqueeze(1) @ rows).squeeze(1) + i.b_dec.to(kind)
