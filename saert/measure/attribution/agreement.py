"""How well estimated effects agree with true ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Correlations of `count` pairs; NaN where one side is constant.

    Attributes:
        pearson: of the effects themselves; spearman: of their ranks, ties at their mean rank.
    """

    pearson: float
    spearman: float
    count: int

    def __str__(self) -> str:
        return f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f} ({self.count} effects)"


def attribution_agreement(estimated: Tensor, true: Tensor) -> Agreement:
    """Correlation of estimated effects [N] with true effects [N] of the same latents at the same
    tokens, such as `attribution.at(...)` and the ablations' change of the metric. In float64.

    Raises ValueError for other shapes, fewer than two pairs, NaN or inf.

    >>> print(attribution_agreement(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 9.0])))
    Pearson 0.918, Spearman 1.000 (3 effects)
    """
    if estimated.dim() != 1 or estimated.shape != true.shape or len(true) < 2:
        raise ValueError(
            f"attribution_agreement: found {list(estimated.shape)} and {list(true.shape)}, "
            "expected two tensors [N] with N of at least 2"
        )
    x, y = (t.detach().cpu().double() for t in (estimated, true))
    if not bool((x.isfinite() & y.isfinite()).all()):
        raise ValueError("attribution_agreement: effects contain NaN or inf")
    return Agreement(_correlation(x, y), _correlation(_ranks(x), _ranks(y)), len(x))


def _correlation(x: Tensor, y: Tensor) -> float:
    if bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = torch.unique(x, return_inverse=True, return_counts=True)
    mean: Tensor = counts.cumsum(0).double() - (counts.double() + 1) / 2
    return mean[place]
