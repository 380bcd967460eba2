"""Matryoshka BatchTopK (Bussmann et al. 2025; ALGORITHMS.md 11, from bartbussmann/matryoshka_sae).

    f = BatchTopK over all n latents,      x̂_g = b_dec + Σ over latents i < m_g of f_i W_dec[i]
    L = mean of FVU(b_dec, x), FVU(x̂_1, x), …, FVU(x̂_G, x),  + α · FVU(ê, x − x̂_G)

Nested dictionaries m_1 < … < m_G = n in one: the first latents have to explain x on their own and
so stay general. The published code's mean of the G + 1 terms is taken once; its terms are squared
errors, ours the same over the batch's variance. The paper's sum is G + 1 times that, so that α
would be G + 1 times larger in its units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from saert.train.dictionary import Dictionary
from saert.train.objectives.base import Batch, Loss, Step, aux_loss, summarise, unexplained
from saert.train.objectives.batch_topk import BatchTopKObjective, packed


@dataclass(frozen=True)
class MatryoshkaObjective(BatchTopKObjective):
    """`groups`: what share of the latents each prefix adds to the one before."""

    name: ClassVar[str] = "matryoshka"
    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        total = sum(self.groups)
        if not self.groups or min(self.groups) <= 0 or not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(
                f"{self.name}: groups {self.groups} sum to {total}, expected positive shares of 1"
            )

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        super().prepare(d, batch)
        self.prefixes(d.num_latents)

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        code = self.select(d, batch, step)
        latents, used = code.indices + d.latents.start, code.values > 0
        # each slot is decoded once, in its own group; a prefix is the sum of its groups
        reconstruction = d.decode(packed(code, torch.zeros_like(used)), batch.x)
        terms = [unexplained(batch.y, reconstruction, batch.variance)]
        ends = self.prefixes(d.num_latents)
        for first, end in pairwise([0, *ends]):
            group = packed(code, used & (latents >= first) & (latents < end))
            reconstruction = reconstruction + d.decode(group, bias=False)
            terms.append(unexplained(batch.y, reconstruction, batch.variance))
        aux = aux_loss(d, batch, reconstruction, step.dead, self.k_aux)
        total = torch.stack(terms).mean() + self.aux * aux
        parts = {f"fvu_{m}": fvu.detach() for m, fvu in zip(ends, terms[1:], strict=True)}
        parts["aux"] = aux.detach()
        return Loss(total, terms[-1].detach(), *summarise(d, code), parts)

    def prefixes(self, num_latents: int) -> list[int]:
        """m_1 … m_G. Raises ValueError if a group is left without a latent."""
        shares = [*accumulate(self.groups)][:-1]
        ends = [*(round(share * num_latents) for share in shares), num_latents]
        if any(end <= first for first, end in pairwise([0, *ends])):
            raise ValueError(
                f"{self.name}: groups {self.groups} of {num_latents} latents end at {ends}; every "
                "group needs a latent"
            )
        return ends
