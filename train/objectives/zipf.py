"""Zipf's law over latents: how often the latent of each rank should fire.

    ρ̂_r = C / (r + q)^s,    Σ over ranks r of ρ̂_r = k

(Ayonrinde 2024; ALGORITHMS.md 5.) Measured densities follow it but for the tail, where latents are
dying, and the head. So s and q are fitted on the middle ranks, and the law is asked about the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 512  # of the middle ranks, evenly spaced: more would not move the fit


@torch.no_grad()
def expected_density(density: Tensor, k: float, middle: tuple[float, float]) -> Tensor:
    """ρ̂ at each latent's rank, float64 [num_latents], from all latents' densities.

    Least squares in log density over log(r + q) for each q of a grid. `middle`: the ranks to fit,
    as shares of all. Rank 1 is the densest latent; equals rank by latent.
    """
    n = len(density)
    ordered, order = density.double().sort(descending=True, stable=True)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=density.device)
    first, last = round(middle[0] * (n - 1)), round(middle[1] * (n - 1))
    points = torch.linspace(first, last, min(POINTS, last - first + 1), device=density.device)
    points = points.round().long()
    fires = (ordered[points] > 0).double()  # the logarithm of a silent latent says nothing
    weight = fires / fires.sum().clamp_min(1)
    grid = torch.logspace(-4, 1, 41, dtype=torch.float64, device=density.device)
    q = n * torch.cat([grid.new_zeros(1), grid])
    x = (ranks[points] + q[:, None]).log()
    y = ordered[points].clamp_min(torch.finfo(torch.float64).tiny).log()
    x = x - (weight * x).sum(-1, keepdim=True)
    y = y - (weight * y).sum()
    spread = (weight * x.square()).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    s = (-(weight * x * y).sum(-1) / spread).clamp_min(0)
    best = (weight * (y + s[:, None] * x).square()).sum(-1).argmin()
    law = k * (-s[best] * (ranks + q[best]).log()).softmax(0)
    return torch.empty_like(law).scatter_(0, order, law)


@torch.no_grad()
def quotas(weights: Tensor, most: int, total: int) -> Tensor:
    """Integers between 1 and `most`, proportional to `weights` [n] as far as those bounds permit,
    that sum to `total`: int64 [n]. What rounding leaves over goes to the largest fractions."""
    n = len(weights)
    if not n <= total <= n * most:
        raise ValueError(f"{total} do not divide into {n} parts of 1 to {most}")
    log = weights.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    low, high = -log.max(), -log.min() + torch.tensor(float(most)).log()
    for _ in range(64):  # the factor's logarithm, by bisection, to the last digit
        middle = (low + high) / 2
        short = (middle + log).exp().clamp(1, most).sum() < total
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    share = (low + log).exp().clamp(1, most)
    whole = share.floor()
    fraction = torch.where(whole < most, share - whole, -1.0)
    rest = total - int(whole.sum())
    whole[fraction.sort(descending=True, stable=True).indices[:rest]] += 1
    return whole.long()
