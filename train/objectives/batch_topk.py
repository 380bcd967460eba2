"""BatchTopK (Bussmann et al. 2024; ALGORITHMS.md 4).

    A = ReLU(W_enc (x − b_dec) + b_enc) over a batch of B tokens,    f: A's k·B largest entries
    L = FVU(x̂, x) + α · FVU(ê, x − x̂)                     (AuxK over dead latents, as in topk.py)
    inference: f = A · 1[A > θ],                     θ = E over batches of the smallest entry kept

θ is a moving average over the batches. Published code gives AuxK's squared error without a
normalisation; here both terms are FVUs, so α has Gao et al.'s meaning and unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saert.activations import Activation, BatchTopK
from saert.train.dictionary import Code, Dictionary
from saert.train.objectives.auxk import AuxKObjective
from saert.train.objectives.base import Batch, Loss, Step, folded


@dataclass(frozen=True)
class BatchTopKObjective(AuxKObjective):
    """k latents a token on average. `decay` is that of θ's moving average."""

    name: ClassVar[str] = "batch_topk"
    lr: ClassVar[float] = 3e-4
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    k: int = 32
    aux: float = 1 / 32
    k_aux: int | None = None
    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"{self.name}: decay is {self.decay}, expected in [0, 1)")

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        if self.k > d.num_latents:
            raise ValueError(f"{self.name}: k is {self.k}, but there are {d.num_latents} latents")
        d.state["threshold"] = d.W_enc.new_tensor(-1.0)

    @torch.no_grad()
    def adopt(self, d: Dictionary, activation: Activation) -> None:
        super().adopt(d, activation)
        if isinstance(activation, BatchTopK) and activation.threshold.dim() == 0:
            d.state["threshold"] = folded(d, activation.threshold).mean().to(d.W_enc)

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        return self.explain(d, batch, self.select(d, batch, step), step.dead)

    def select(self, d: Dictionary, batch: Batch, step: Step) -> Code:
        """The batch's code; θ follows."""
        code, least = d.batch_topk(batch.x, self.k, batch.tokens)
        d.state["threshold"] = follow(d.state["threshold"], least, step, self.decay)
        return packed(code, code.values > 0)

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return BatchTopK(whole["state.threshold"])


@torch.no_grad()
def follow(average: Tensor, value: Tensor, step: Step, decay: float) -> Tensor:
    """The moving average after another value, elementwise; a value that is not positive counts as
    none, and an average below zero as not begun: the first value is assigned."""
    value = value.to(average.dtype)
    moved = torch.where(average < 0, value, torch.lerp(value, average, rising(decay, step)))
    return torch.where(value > 0, moved, average)


def rising(decay: float, step: Step) -> float:
    """A moving average's decay at a step: it grows towards `decay` as (1 + n) / (10 + n).

    A fixed one would remember the untrained dictionary for several times 1 / (1 − decay) batches.
    """
    return min(decay, (1 + step.number) / (10 + step.number))


def packed(code: Code, mask: Tensor) -> Code:
    """The slots in `mask` (bool, as the code's) in as few columns as their widest token needs.

    A decoder reads a row of W_dec for every slot, and BatchTopK's search leaves most slots unused.
    """
    width = max(1, int(mask.sum(-1).max()))
    slots = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :width]
    values = torch.where(mask, code.values, 0)
    return Code(code.indices.gather(-1, slots), values.gather(-1, slots))
