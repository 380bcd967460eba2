"""What the objectives share that keep k latents and revive dead ones (Gao et al. 2024):

    L = FVU(x̂, x) + α · FVU(ê, x − x̂),    ê from the k_aux strongest dead latents (`aux_loss`)

Which k latents a code keeps is each objective's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from saert.activations import Activation, TopK
from saert.train.dictionary import Code, Dictionary
from saert.train.objectives.base import Batch, Loss, Objective, aux_loss, summarise, unexplained


class AuxKObjective(Objective):
    """k latents a token, α = `aux`, and `k_aux` (None: the power of two nearest to d_in / 2).

    A subclass declares the three, as fields in an order of its own.
    """

    k: int
    aux: float
    k_aux: int | None

    def __post_init__(self) -> None:
        if self.k < 1 or (self.k_aux is not None and self.k_aux < 1):
            raise ValueError(f"{self.name}: k {self.k}, k_aux {self.k_aux}; expected at least 1")
        if not 0 <= self.aux < math.inf:
            raise ValueError(f"{self.name}: aux is {self.aux}, expected finite and not negative")

    def explain(self, d: Dictionary, batch: Batch, code: Code, among: Tensor) -> Loss:
        """L of a code; `among` (bool [local]) are the latents that may explain the residual."""
        reconstruction = d.decode(code, batch.x)
        fvu = unexplained(batch.y, reconstruction, batch.variance)
        aux = aux_loss(d, batch, reconstruction, among, self.k_aux)
        return Loss(fvu + self.aux * aux, fvu.detach(), *summarise(d, code), {"aux": aux.detach()})

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return TopK(self.k)
