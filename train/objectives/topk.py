"""TopK (Gao et al. 2024; ALGORITHMS.md 1.2, 1.5, 1.6).

    f = ReLU(TopK_k(W_enc (x − b_dec) + b_enc)),    x̂ = Σ f_i W_dec[i] + b_dec
    L = FVU(x̂, x) + α · FVU(ê, x − x̂) [+ β · FVU(x̂_4k, x)]

AuxK, the second term, lets the k_aux strongest dead latents explain the residual. Multi-TopK, the
third, decodes the 4k largest as well (β = 1/8), which gives codes that can be cut at other k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from saert.train.dictionary import Dictionary, narrow
from saert.train.objectives.auxk import AuxKObjective
from saert.train.objectives.base import Batch, Loss, Step, unexplained


@dataclass(frozen=True)
class TopKObjective(AuxKObjective):
    """k latents a token. `multi` is Multi-TopK's weight (the paper's: 1/8); 0 leaves it out."""

    name: ClassVar[str] = "topk"
    k: int = 32
    aux: float = 1 / 32
    k_aux: int | None = None
    multi: float = 0.0
    multi_factor: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_factor < 1 or not 0 <= self.multi < math.inf:
            raise ValueError(
                f"topk: multi_factor {self.multi_factor} must be at least 1, multi {self.multi} "
                "finite and not negative"
            )

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        if not self.multi:
            return self.explain(d, batch, d.topk(batch.x, self.k), step.dead)
        wide = d.topk(batch.x, self.k * self.multi_factor)
        loss = self.explain(d, batch, narrow(wide, self.k, d.mesh), step.dead)
        multi = unexplained(batch.y, d.decode(wide, batch.x), batch.variance)
        parts = {**loss.parts, "multi_fvu": multi.detach()}
        return replace(loss, total=loss.total + self.multi * multi, parts=parts)
