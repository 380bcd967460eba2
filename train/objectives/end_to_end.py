"""End-to-end training: TopK whose reconstruction has to keep the language model's predictions, not
only the hidden state (the KL of Braun et al. 2024, with an FVU term beside it).

    f = ReLU(TopK_k(W_enc (x − b_dec) + b_enc)),    x̂ = Σ f_i W_dec[i] + b_dec
    L = mean over positions of KL(model ‖ model with x̂ spliced in) + w · FVU(x̂, x)
        + α · FVU(ê, x − x̂)

The KL is in nats a position and does not depend on the units of x; FVU and AuxK are TopK's. w = 0
leaves nothing that asks for a faithful x̂: any hidden state with the same continuation will do. To
fine-tune a trained dictionary, start from its weights with a small learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from saert.train.dictionary import Dictionary
from saert.train.objectives.auxk import AuxKObjective
from saert.train.objectives.base import Batch, Loss, Step, aux_loss, summarise, unexplained


@dataclass(frozen=True)
class EndToEndObjective(AuxKObjective):
    """k latents a token; `mse` is the FVU's weight beside the KL."""

    name: ClassVar[str] = "end_to_end"
    wants: ClassVar[str | None] = "downstream"
    k: int = 32
    mse: float = 1.0
    aux: float = 1 / 32
    k_aux: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mse < math.inf:
            raise ValueError(f"end_to_end: mse is {self.mse}, expected finite and not negative")

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        if batch.downstream is None:
            raise ValueError(
                "end_to_end: found a batch without `downstream`; expected the function that "
                "splices a reconstruction into the language model"
            )
        code = d.topk(batch.x, self.k)
        reconstruction = d.decode(code, batch.x)
        kl = batch.downstream(reconstruction)
        fvu = unexplained(batch.y, reconstruction, batch.variance)
        aux = aux_loss(d, batch, reconstruction, step.dead, self.k_aux)
        total = kl + self.mse * fvu + self.aux * aux
        parts = {"kl": kl.detach(), "aux": aux.detach()}
        return Loss(total, fvu.detach(), *summarise(d, code), parts)
