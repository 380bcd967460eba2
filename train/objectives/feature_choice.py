"""Feature Choice (Ayonrinde 2024; ALGORITHMS.md 5): latents choose tokens.

    f_i: the m_i largest entries of column i of ReLU(W_enc (x − b_dec) + b_enc), over a batch of B
         tokens;  Σ m_i = k·B,  1 ≤ m_i ≤ B,  m_i uniform or ∝ Zipf's law at the latent's rank
    L = FVU(x̂, x) + α · FVU(ê, x − x̂)
    inference: f_i = A_i · 1[A_i > θ_i],    θ_i = E over batches of column i's smallest entry kept

No latent can fall silent for want of tokens. One whose scores are all negative still can: it keeps
tokens, and passes on zeros. AuxK brings it back.

UNVERIFIED: the progressive recipe, as reconstructed in ALGORITHMS.md. For the first `warm` of the
run the loss is Mutual Choice's; then the ranks of the densities reached, and with them the m_i,
stay as they are. With warm = 0 the ranks are those of the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from saert.activations import Activation, JumpReLU
from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives.base import (
    Batch,
    Loss,
    Step,
    aux_loss,
    summarise_dense,
    unexplained,
)
from saert.train.objectives.batch_topk import follow
from saert.train.objectives.mutual_choice import MutualChoiceObjective
from saert.train.objectives.zipf import quotas


@dataclass(frozen=True)
class FeatureChoiceObjective(MutualChoiceObjective):
    """`shape` of the m_i; `warm`: the part of the run that starts as Mutual Choice."""

    name: ClassVar[str] = "feature_choice"
    shape: Literal["zipf", "uniform"] = "zipf"
    warm: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in ("zipf", "uniform") or not 0 <= self.warm <= 1:
            raise ValueError(
                f"{self.name}: shape {self.shape!r}, expected zipf or uniform; warm {self.warm}, "
                "expected in [0, 1]"
            )

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        super().prepare(d, batch)
        d.state["thresholds"] = d.W_enc.new_full((d.local,), -1.0)

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        if step.progress < self.warm:
            return super().loss(d, batch, step)
        scores = d.scores(batch.x)
        kept, least = choose_tokens(scores, self.counts(d, batch.tokens), d.mesh)
        d.state["thresholds"] = follow(d.state["thresholds"], least, step, self.decay)
        f = scores.relu() * kept
        reconstruction = d.decode_dense(f, batch.x)
        fvu = unexplained(batch.y, reconstruction, batch.variance)
        aux = aux_loss(d, batch, reconstruction, step.dead, self.k_aux)
        total, parts = fvu + self.aux * aux, {"aux": aux.detach()}
        return Loss(total, fvu.detach(), *summarise_dense(f), parts)

    def counts(self, d: Dictionary, tokens: int) -> Tensor:
        """m_i of this shard's latents. Raises ValueError if a latent would be left without one."""
        if self.k * tokens < d.num_latents:
            raise ValueError(
                f"{self.name}: k · tokens is {self.k} · {tokens}, fewer than the {d.num_latents} "
                "latents, each of which chooses a token; train on larger batches"
            )
        weights = self.law(d) if self.shape == "zipf" else d.W_enc.new_ones(d.num_latents)
        return quotas(weights, tokens, self.k * tokens)[d.latents]

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        # a latent that never kept anything since `warm` has only Mutual Choice's threshold
        own, common = whole["state.thresholds"], whole["state.threshold"]
        return JumpReLU(torch.where(own < 0, common, own))


@torch.no_grad()
def choose_tokens(scores: Tensor, counts: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Each latent's `counts` [local] largest positive scores of the batch, earlier tokens first
    among equals: scores [T, local] -> (bool [T, local], the smallest kept [local], or 0).

    Replicas exchange each column's best max(counts) scores, and no more than their tokens: with
    one common latent that is [tokens, local], the dense scores of the whole batch on each of them.
    """
    width = min(len(scores), int(counts.max()))
    best = scores.sort(dim=0, descending=True, stable=True)
    candidates = mesh.gather_tokens(best.values[:width].contiguous())
    found = candidates.sort(dim=0, descending=True, stable=True)
    numbers = torch.arange(len(candidates), device=scores.device)[:, None]
    places = torch.empty_like(found.indices)
    places.scatter_(0, found.indices, numbers.expand_as(places))
    own = places[mesh.replica * width : (mesh.replica + 1) * width]
    chosen = (own < counts) & (best.values[:width] > 0)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best.indices[:width], chosen)
    last = torch.minimum(counts, (candidates > 0).sum(0)) - 1
    least = found.values.gather(0, last.clamp_min(0)[None])[0]
    return kept, torch.where(last < 0, 0, least)
