"""The best one-to-one matching of two sets of directions, without the matrix of all cosines.

Between two dictionaries of n latents lie n² cosines, 64 GiB at n = 131,072, but a matching uses n
of them. So: collect the nearest directions of each latent, both ways; match on this sparse graph;
then test the answer against all pairs, a block of rows at a time. Linear programming duality says
how: for *any* numbers v_j (prices), every matching π obeys

    Σ_i c[i, π(i)]  ≤  Σ_i max_j (c[i, j] - v_j)  +  Σ_j v_j

and with optimal prices both sides are equal. Pairs that break the prices of the sparse graph join
it and the matching is made anew (column generation), until the bound meets the matching. What
comes back is then the maximum over all n! matchings; cut short, it comes with its bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saert.measure.progress import tracked

BLOCK = 1 << 25
"""Cosines that exist at a time."""
SHIFT = 3.0
"""Added to every cosine: the sparse solver takes a weight of 0 for a missing pair."""


@dataclass(frozen=True)
class Matching:
    """Rows of one matrix matched to rows of another, one to one.

    Attributes:
        partner: int64 [n], the row of the second matrix that each row of the first goes with.
        cosines: float64 [n], of the pairs.
        bound: no matching has a larger mean cosine than this.
        nearest, nearest_back: float32 [n], the largest cosine of each row of the first matrix to
            any of the second, and the reverse.
        rounds: how many times the graph grew.
    """

    partner: Tensor
    cosines: Tensor
    bound: float
    nearest: Tensor
    nearest_back: Tensor
    rounds: int

    @property
    def mean(self) -> float:
        """The mean cosine of the pairs."""
        return float(self.cosines.mean())


@torch.no_grad()
def match(
    a: Tensor,
    b: Tensor,
    *,
    candidates: int = 32,
    tolerance: float = 1e-6,
    max_rounds: int = 20,
    progress: bool = False,
) -> Matching:
    """The matching of the rows of a and b with the largest mean cosine.

    Args:
        a, b: unit rows, float32 [n, d] each.
        candidates: nearest rows that each row of either side starts with.
        tolerance: stop when the bound is this close to the mean; below 1e-7 it cannot get, as the
            cosines are float32.
        max_rounds: stop then, whatever the bound.

    Memory: `candidates` · n pairs and a block of 2²⁵ cosines. Raises ImportError without scipy.
    """
    try:
        import scipy.sparse  # noqa: F401
    except ImportError:
        raise ImportError("matching latents needs scipy: pip install 'saert[measure]'") from None
    n = len(a)
    top = min(candidates, n)
    near, there = nearest(a, b, top, progress=progress)
    back, from_there = nearest(b, a, top, progress=progress)
    rows = torch.arange(n)
    diagonal = (a * b).sum(1).cpu()  # these pairs make sure that there is a matching at all
    forth = (rows[:, None] * n + there).flatten()
    graph = _graph(
        torch.cat((forth, (from_there * n + rows[:, None]).flatten(), rows * n + rows)),
        torch.cat((near.flatten(), back.flatten(), diagonal)),
    )
    for turn in range(max_rounds + 1):
        partner, cosines, prices = _solve(*graph, n)
        allowed = cosines - prices[partner] + tolerance / 10
        most, *broken = _broken(a, b, prices, allowed, progress)
        bound = most + float(prices.mean())
        grown = _graph(*(torch.cat(parts) for parts in zip(graph, broken, strict=True)))
        over = len(grown[0]) == len(graph[0]) or turn == max_rounds
        if over or bound - float(cosines.mean()) <= tolerance:
            break
        graph = grown
    return Matching(
        torch.from_numpy(partner), torch.from_numpy(cosines),
        max(bound, float(cosines.mean())), near[:, 0], back[:, 0], turn,
    )  # fmt: skip


def nearest(a: Tensor, b: Tensor, top: int, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """For each row of a the `top` rows of b with the largest cosine, the largest first: float32
    and int64 [len(a), top], on the CPU."""
    found = [
        [part.cpu() for part in cosines.topk(top, dim=1)] for _, cosines in _blocks(a, b, progress)
    ]
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, indices


def _blocks(a: Tensor, b: Tensor, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block, and its cosines [rows, len(b)]."""
    step = max(1, BLOCK // len(b))
    starts = range(0, len(a), step)
    for first in tracked(starts, "comparing latents", progress, total=len(starts)):
        yield first, a[first : first + step] @ b.T


def _broken(
    a: Tensor, b: Tensor, prices: Any, allowed: Any, progress: bool
) -> tuple[float, Tensor, Tensor]:
    """The mean over rows of the largest cosine - price; and up to 8 pairs of each row in which that
    is above what is allowed: keys and cosines."""
    costs = torch.from_numpy(prices).to(a.device, a.dtype)
    limits = torch.from_numpy(allowed).to(a.device)
    total, keys, values = 0.0, [], []
    for first, cosines in _blocks(a, b, progress):
        left = cosines - costs
        best = left.amax(1).double()
        total += float(best.sum())
        rows = (best > limits[first : first + len(best)]).nonzero().flatten()
        gains, columns = left[rows].topk(min(8, len(b)), dim=1)
        over = gains.double() > limits[first + rows, None]
        keys.append(((rows + first)[:, None] * len(b) + columns)[over].cpu())
        values.append(cosines[rows].gather(1, columns)[over].cpu())
    return total / len(a), torch.cat(keys), torch.cat(values)


def _graph(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (key = row · n + column) in order, each once."""
    keys, order = keys.sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], values[order][first]


def _solve(keys: Tensor, values: Tensor, n: int) -> tuple[Any, Any, Any]:
    """The best matching on a sparse graph: the partner and the cosine of each row, and prices v_j
    of the columns with c_ij - v_j at its largest, on the graph, where i meets its partner.

    scipy's solver keeps its prices to itself; they are longest paths: v_j ≥ v_π(i) + c_ij - c_iπ(i)
    (Bellman and Ford). The optimum has no circle of positive length, so the paths end.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows, columns = (keys // n).numpy(), (keys % n).numpy()
    weights = values.double().numpy()
    graph = csr_array((weights + SHIFT, (rows, columns)), shape=(n, n))
    partner = min_weight_full_bipartite_matching(graph, maximize=True)[1].astype(np.int64)
    matched = columns == partner[rows]  # one in each row, in the order of rows
    cosines = weights[matched]
    order = np.argsort(columns, kind="stable")
    source, gain = partner[rows[order]], (weights - cosines[rows])[order]
    starts = np.searchsorted(columns[order], np.arange(n))
    prices = np.zeros(n)
    for _ in range(n):
        raised = np.maximum(np.maximum.reduceat(prices[source] + gain, starts), prices)
        risen = float((raised - prices).max())
        prices = raised
        if risen <= 1e-9:
            break
    return partner, cosines, prices
