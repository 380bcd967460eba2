"""Mutual Choice with aux-zipf (Ayonrinde 2024; ALGORITHMS.md 5).

    f: the k·B largest entries of ReLU(W_enc (x − b_dec) + b_enc) over a batch of B tokens
    L = FVU(x̂, x) + α · FVU(ê, x − x̂),    ê from the k_aux strongest latents of U on each token
    U = {i : i is dead, or ρ_i < c · ρ̂_r(i)}

The forward is BatchTopK's. ρ is the moving average of the latents' densities, r(i) the rank of
latent i among them, ρ̂ Zipf's law fitted to the middle ranks (`zipf.py`).

UNVERIFIED: the name and purpose of aux-zipf are Ayonrinde's; U, c, the fit and α are the
reconstruction in ALGORITHMS.md. c = 0 is AuxK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saert.train.dictionary import Code, Dictionary
from saert.train.objectives.base import Batch, Loss, Step
from saert.train.objectives.batch_topk import BatchTopKObjective, rising
from saert.train.objectives.zipf import expected_density


@dataclass(frozen=True)
class MutualChoiceObjective(BatchTopKObjective):
    """`underused` is c; `middle` the ranks that Zipf's law is fitted to, as shares of all latents.
    `decay` is that of ρ as well as of θ."""

    name: ClassVar[str] = "mutual_choice"
    underused: float = 0.5
    middle: tuple[float, float] = (0.1, 0.7)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.middle
        if self.underused < 0 or not 0 <= low < high <= 1:
            raise ValueError(
                f"{self.name}: underused {self.underused} must not be negative, middle "
                f"{self.middle} two ascending shares"
            )

    @torch.no_grad()
    def prepare(self, d: Dictionary, batch: Batch) -> None:
        super().prepare(d, batch)
        code, _ = d.batch_topk(batch.x, self.k, batch.tokens)
        d.state["density"] = density(d, code, batch)

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        code = self.select(d, batch, step)
        found, decay = density(d, code, batch), rising(self.decay, step)
        d.state["density"] = torch.lerp(found, d.state["density"], decay)
        neglected = step.dead | (d.state["density"] < self.underused * self.law(d)[d.latents])
        return self.explain(d, batch, code, neglected)

    def law(self, d: Dictionary) -> Tensor:
        """ρ̂ of all latents, whatever the shard: their ranks are among all of them."""
        whole = d.mesh.gather_latents(d.state["density"])
        return expected_density(whole, self.k, self.middle)


def density(d: Dictionary, code: Code, batch: Batch) -> Tensor:
    """The share of the batch's tokens on which each of this shard's latents is active, [local]."""
    counts = torch.bincount(code.indices[code.values > 0], minlength=d.local)
    return d.mesh.sum_tokens(counts).to(d.W_enc.dtype) / batch.tokens
