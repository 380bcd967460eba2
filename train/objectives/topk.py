"""TopK (Gao et al. 2024; ALGORITHMS.md 1.2, 1.5, 1.6).

    f = ReLU(TopK_k(W_enc (x − b_dec) + b_enc)),    x̂ = Σ f_i W_dec[i] + b_dec
    L = FVU(x̂, x) + α · FVU(ê, x − x̂) [+ β · FVU(x̂_4k, x)]

AuxK, the second term, lets the k_aux strongest dead latents explain the residual. Multi-TopK, the
third, decodes the 4k largest as well (β = 1/8), which gives codes that can be cut at other k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saert.activations import Activation, TopK
from saert.train.dictionary import Dictionary, narrow
from saert.train.objectives.base import (
    Batch,
    Loss,
    Objective,
    Step,
    aux_loss,
    summarise,
    unexplained,
)


@dataclass(frozen=True)
class TopKObjective(Objective):
    """k latents a token. `multi` is Multi-TopK's weight (the paper's: 1/8); 0 leaves it out."""

    name: ClassVar[str] = "topk"
    k: int = 32
    aux: float = 1 / 32
    k_aux: int | None = None  # None: the power of two nearest to d_in / 2
    multi: float = 0.0
    multi_factor: int = 4

    def __post_init__(self) -> None:
        if self.k < 1 or self.multi_factor < 1 or (self.k_aux is not None and self.k_aux < 1):
            raise ValueError(
                f"topk: k {self.k}, k_aux {self.k_aux} and multi_factor {self.multi_factor} must "
                "be at least 1"
            )
        if not (0 <= self.aux < math.inf and 0 <= self.multi < math.inf):
            raise ValueError(f"topk: aux {self.aux} and multi {self.multi} must be at least 0")

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        wide = d.topk(batch.x, self.k * self.multi_factor if self.multi else self.k)
        code = narrow(wide, self.k, d.mesh) if self.multi else wide
        reconstruction = d.decode(code, batch.x)
        fvu = unexplained(batch.y, reconstruction, batch.variance)
        aux = aux_loss(d, batch, reconstruction, step.dead, self.k_aux)
        total, parts = fvu + self.aux * aux, {"aux": aux.detach()}
        if self.multi:
            multi = unexplained(batch.y, d.decode(wide, batch.x), batch.variance)
            total, parts = total + self.multi * multi, parts | {"multi_fvu": multi.detach()}
        return Loss(total, fvu.detach(), *summarise(d, code), parts)

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return TopK(self.k)
