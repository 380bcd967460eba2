"""Gated SAE (Rajamanoharan et al. 2024a; ALGORITHMS.md 2).

    π = W_enc (x − b_dec) + b_gate,    m = ReLU(exp(r_mag) ⊙ W_enc (x − b_dec) + b_mag)
    f = 1[π > 0] ⊙ m,    x̂ = Σ f_i W_dec[i] + b_dec,    ‖W_dec[i]‖ = 1
    L = FVU(x̂, x) + λ · mean over tokens of Σ ReLU(π_i) / σ
        + α · FVU(Σ ReLU(π_i) sg(W_dec[i]) + sg(b_dec), x),    σ² = mean of ‖x − x̄‖²

The step has no gradient: the gate learns from the last two terms alone, which shrink ReLU(π) but
not m. `d.b_enc` is b_gate. The decoder is frozen in the auxiliary term, as in the paper (SAELens
lets it move); b_dec stays free where π subtracts it.

The paper's loss is this one times σ² with λ′ = λ·σ, and α = 1: λ is a pure number, as for ReLU and
L1. λ rises linearly over the first part `warm` of the steps; with a `target_l0` it is controlled
from then on (`saert.train.objectives.sparsity`).

The result equals JumpReLU on exp(r_mag) ⊙ W_enc (x − b_dec) + b_mag with the thresholds
max(0, b_mag − exp(r_mag) · b_gate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from saert.activations import Activation, Gated
from saert.train.dictionary import Dictionary
from saert.train.objectives.base import Batch, Loss, Step, folded, summarise_dense, unexplained
from saert.train.objectives.sparsity import L1Objective


@dataclass(frozen=True)
class GatedObjective(L1Objective):
    """λ = `l1`; with a `target_l0`, where λ starts. `gain`: of λ's control. α = `aux`."""

    name: ClassVar[str] = "gated"
    normalise: ClassVar[str] = "unit"
    has_b_enc: ClassVar[bool] = False
    lr: ClassVar[float] = 5e-5
    betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    l1: float = 0.05
    aux: float = 1.0
    warm: float = 0.05
    target_l0: float | None = None
    gain: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.aux >= 0:
            raise ValueError(f"gated: aux is {self.aux}, expected at least 0")

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        super().prepare(d, batch)
        d.extra["r_mag"] = nn.Parameter(torch.zeros_like(d.b_enc))
        d.extra["b_mag"] = nn.Parameter(d.b_enc.detach().clone())  # both see x − centre

    @torch.no_grad()
    def adopt(self, d: Dictionary, activation: Activation) -> None:
        if isinstance(activation, Gated):
            for own, saved in (
                (d.b_enc, folded(d, activation.b_gate)),
                (d.extra["b_mag"], folded(d, activation.b_mag)),
                (d.extra["r_mag"], activation.r_mag),
            ):
                own.copy_(saved[d.latents])

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        pi = d.scores(batch.x)
        magnitude = (d.extra["r_mag"].exp() * (pi - d.b_enc) + d.extra["b_mag"]).relu()
        f, via_gate = (pi > 0) * magnitude, pi.relu()
        fvu = unexplained(batch.y, d.decode_dense(f, batch.x), batch.variance)
        aux = unexplained(batch.y, decode_frozen(d, via_gate, batch.x), batch.variance)
        penalty, parts = self.penalty(d, batch, step, f, shrunk=via_gate)
        total, parts = fvu + penalty + self.aux * aux, parts | {"aux": aux.detach()}
        return Loss(total, fvu.detach(), *summarise_dense(f), parts)

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return Gated(whole["b_enc"], whole["extra.b_mag"], whole["extra.r_mag"])


def decode_frozen(d: Dictionary, f: Tensor, x: Tensor) -> Tensor:
    """`d.decode_dense(f, x)` through copies of the decoder that get no gradient."""
    W_dec = d.W_dec.detach().to(d.compute)
    y = d.mesh.sum_latents((f.to(d.compute) @ W_dec).to(f.dtype)) + d.b_dec.detach()
    return y if d.W_skip is None else y + x @ d.W_skip.detach().T
