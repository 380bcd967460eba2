"""Adaptive Temporal Masking (arXiv 2510.08855; ALGORITHMS.md 7): latents that have mattered little
lately are left out of random batches.

    f = ReLU(W_enc (x − b_dec) + b_enc),    x̂ = Σ keep_i f_i W_dec[i] + b_dec
    L = FVU(x̂, x) + λ · mean over tokens of Σ keep_i f_i / σ,    σ² = mean of ‖x − x̄‖²

    M_i ← β M_i + (1 − β) mean f_i,                  F_i ← β F_i + (1 − β) mean 1[f_i > 0],
    C_i ← β C_i + (1 − β) mean (f_i ⟨W_dec[i], x − x̂₋ᵢ⟩)₊
    I = w_M M / M̄ + w_F F / F̄ + w_C C / C̄,          θ = mean(I) + c · std(I)
    p_i = 1 − exp(−r (θ − I_i) / θ) if I_i < θ, else 0,    keep_i ~ Bernoulli(1 − p_i)

x̂₋ᵢ is the reconstruction without latent i: x − x̂₋ᵢ = x − x̂ + keep_i f_i W_dec[i]. M, F and C come
from f before the masking, so a masked latent goes on being measured and can return. A mask holds
for one batch; it is drawn from the statistics of the batches before.

The published summary has θ, p, the three statistics and the two terms of the loss. UNVERIFIED, so
ours: β, c, r, the weights w, how the statistics are combined, that the penalty is L1 (with the λ
and the warm-up of `relu_l1`, which this is if r = 0), masks for a whole batch, and none in the
first part `mask_from` of the steps, in which the statistics settle.

The export is ReLU: masks belong to training, where they keep latents from relying on others that
matter little, and at inference every latent is on. To switch off the latents most often masked
would be a threshold that the source does not have, and p is no such decision: a latent of p = 0.6
still trains in 40% of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saert.activations import Activation, ReLU
from saert.kernels.linear import linear_scores
from saert.train.dictionary import Dictionary
from saert.train.objectives.base import Batch, Loss, Objective, Step, summarise_dense, unexplained
from saert.train.objectives.sparsity import spread, warmed_up

STATISTICS = ("magnitude", "frequency", "contribution")


@dataclass(frozen=True)
class ATMObjective(Objective):
    """λ = `l1`, which rises over the first part `warm` of the steps; β = `decay`, c, r and w of the
    masks, which begin at the part `mask_from` of the steps."""

    name: ClassVar[str] = "atm"
    normalise: ClassVar[str] = "unit"
    l1: float = 0.05
    warm: float = 0.05
    decay: float = 0.99
    c: float = 0.0
    r: float = 1.0
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)  # of M, F and C
    mask_from: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.l1 < math.inf or not 0 <= self.r < math.inf or not math.isfinite(self.c):
            raise ValueError(
                f"atm: l1 {self.l1} and r {self.r} must be finite and not negative, c {self.c} "
                "finite"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"atm: decay is {self.decay}, expected in [0, 1)")
        if not 0 <= self.warm <= 1 or not 0 <= self.mask_from <= 1:
            raise ValueError(
                f"atm: warm {self.warm} and mask_from {self.mask_from} are parts of the steps, "
                "expected in [0, 1]"
            )
        if len(self.weights) != 3 or not all(0 <= w < math.inf for w in self.weights):
            raise ValueError(
                f"atm: weights are {self.weights}, expected three that are finite and not negative"
            )

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        d.state |= {name: torch.zeros_like(d.b_enc.detach()) for name in STATISTICS}

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        f = d.scores(batch.x).relu()
        keep = self._draw(d, step)
        kept = f * keep
        reconstruction = d.decode_dense(kept, batch.x)
        fvu = unexplained(batch.y, reconstruction, batch.variance)
        l1 = kept.sum() / (spread(batch) * batch.tokens)
        self._observe(d, batch, f.detach(), keep, (batch.y - reconstruction).detach())
        masked = (~keep).sum().to(fvu.dtype) / (d.num_latents * d.mesh.replicas)
        parts = {
            "l1": d.mesh.sum_latents(l1.detach()),
            "masked": d.mesh.sum_latents(masked),
        }
        total = fvu + self.l1 * warmed_up(step, self.warm) * l1
        return Loss(total, fvu.detach(), *summarise_dense(f), parts)

    @torch.no_grad()
    def importance(self, d: Dictionary) -> tuple[Tensor, Tensor]:
        """I [local] of this shard's latents, and θ over all latents."""
        found = torch.stack([d.state[name] for name in STATISTICS])
        mean = d.mesh.sum_latents(found.sum(-1)) / d.num_latents
        relative = found / mean.clamp_min(torch.finfo(found.dtype).tiny)[:, None]
        importance = found.new_tensor(self.weights) @ relative
        centre = d.mesh.sum_latents(importance.sum()) / d.num_latents
        spread = d.mesh.sum_latents((importance - centre).square().sum()) / d.num_latents
        return importance, centre + self.c * spread.sqrt()

    @torch.no_grad()
    def probabilities(self, d: Dictionary) -> Tensor:
        """p [local], with which each of this shard's latents is masked once masks begin."""
        importance, theta = self.importance(d)
        # no importance is negative, so a θ at or below zero masks nothing
        below = (theta - importance).clamp_min(0) / theta.clamp_min(torch.finfo(theta.dtype).tiny)
        return -torch.expm1(-self.r * below)

    def _draw(self, d: Dictionary, step: Step) -> Tensor:
        """bool [local], false where masked; the same for any number of shards."""
        if step.progress < self.mask_from:
            return torch.ones(d.local, dtype=torch.bool, device=d.W_enc.device)
        chance = torch.rand(d.num_latents, generator=step.generator(), dtype=torch.float64)
        return chance[d.latents].to(d.W_enc.device) >= self.probabilities(d)

    @torch.no_grad()
    def _observe(
        self, d: Dictionary, batch: Batch, f: Tensor, keep: Tensor, residual: Tensor
    ) -> None:
        agreement = linear_scores(residual, d.W_dec.to(d.compute), None)
        own = f * (keep * d.W_dec.square().sum(-1))  # f_i ‖W_dec[i]‖², if it was in x̂
        contribution = (f * (agreement + own)).relu()
        sums = torch.stack([f.sum(0), (f > 0).to(f.dtype).sum(0), contribution.sum(0)])
        means = d.mesh.sum_tokens(sums) / batch.tokens
        for name, mean in zip(STATISTICS, means, strict=True):
            d.state[name] = torch.lerp(mean.to(d.state[name].dtype), d.state[name], self.decay)

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return ReLU()
