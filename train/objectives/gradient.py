"""Gradient SAE, g-SAE (Olmo et al. 2024, arXiv 2411.10397; ALGORITHMS.md 6): TopK, but what a
latent does to the language model's loss counts in the selection.

    z = ReLU(W_enc (x − b_dec) + b_enc),    score = z + β · z ∘ |ĝ W_decᵀ|
    f = z at the k largest scores, 0 elsewhere,    x̂ = Σ f_i W_dec[i] + b_dec
    L = FVU(x̂, x) + α · FVU(ê, x − x̂)

z_i |⟨g, W_dec[i]⟩| is, to first order, how much the loss L_LM changes when latent i is left out; g
is ∇L_LM where the dictionary writes, which for a transcoder is its target's hookpoint. The score
selects and does no more: kept values are plain z, and no gradient flows through it. AuxK is TopK's.

UNVERIFIED, so ours: β; that the two terms are added (`mode` "product" ranks by z ∘ |ĝ W_decᵀ|
alone, where a token without a gradient, such as the last of a row, gets no code); which loss g
belongs to (the summed next-token cross-entropy); and its normalisation,

    ĝ = g · √d_out / mean over the batch of ‖g‖

which makes |⟨ĝ, W_dec[i]⟩| about 1 for a unit direction that has nothing to do with the gradient,
so that β means the same for every loss, model and width. The published rule for inference without
a gradient is not known either: the export is TopK(k), which ranks by z alone, so other latents may
be selected than in training.

Scores are dense here, [T, local]: the weight of a latent differs from token to token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saert.kernels.linear import linear_scores
from saert.kernels.select import topk
from saert.train.dictionary import Code, Dictionary
from saert.train.objectives.auxk import AuxKObjective
from saert.train.objectives.base import Batch, Loss, Step
from saert.train.selection import token_ranks

MODES = ("additive", "product")


@dataclass(frozen=True)
class GradientObjective(AuxKObjective):
    """k latents a token, ranked by activation and effect. `beta` counts in mode "additive" only."""

    name: ClassVar[str] = "gradient"
    wants: ClassVar[str | None] = "gradient"
    k: int = 32
    beta: float = 1.0
    mode: str = "additive"
    normalise_gradient: bool = True
    aux: float = 1 / 32
    k_aux: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"gradient: beta is {self.beta}, expected finite and not negative")
        if self.mode not in MODES:
            raise ValueError(f"gradient: mode is {self.mode!r}, expected {' or '.join(MODES)}")

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        return self.explain(d, batch, self.encode(d, batch), step.dead)

    def encode(self, d: Dictionary, batch: Batch) -> Code:
        """This shard's slots of the code, best score first."""
        scores = d.scores(batch.x)
        with torch.no_grad():
            ranked, indices = topk(scores.relu() * self._weight(d, batch), min(self.k, d.local))
            if ranked[:, 0].isnan().any():  # NaN ranks above everything
                raise FloatingPointError("the scores or the gradient contain NaN")
            kept = ranked > 0
            if d.mesh.shards > 1:
                kept &= token_ranks(ranked, d.mesh) < self.k
        return Code(indices, torch.where(kept, scores.gather(-1, indices), 0))

    def _weight(self, d: Dictionary, batch: Batch) -> Tensor:
        """[T, local]: what a latent's activation is multiplied by for the ranking."""
        g = batch.gradient
        if g is None or g.shape != batch.y.shape:
            found = "without a gradient" if g is None else f"with a gradient {list(g.shape)}"
            raise ValueError(
                f"gradient: found a batch {found}; expected ∇ of the language model's loss where "
                f"the dictionary writes, {list(batch.y.shape)}"
            )
        if self.normalise_gradient:
            mean = d.mesh.sum_tokens(g.norm(dim=-1).sum()) / batch.tokens
            g = g * (math.sqrt(d.d_out) / mean.clamp_min(torch.finfo(g.dtype).tiny))
        effect = linear_scores(g, d.W_dec.to(d.compute), None).abs()
        return 1 + self.beta * effect if self.mode == "additive" else effect
