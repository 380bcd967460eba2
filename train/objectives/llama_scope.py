"""Llama Scope (He et al. 2024; OpenMOSS's code of November 2024; ALGORITHMS.md 10).

    a = W_enc x + b_enc      (b_dec is not subtracted),      ν_i = ‖W_dec[i]‖, which is free
    S = the K_t largest positive a_i · ν_i of a token,       f_i = a_i for i in S
    L = mean over tokens of  (1/d_out) · ‖x̂ − x‖² / ‖x − x̄‖      (the norm, not its square)
    K_t = ⌈max(1, k₀ + (1 − k₀) · t / T) · k⌉,   k₀ = d_in / (2k),   T = warm · steps

K_t falls from d_in / 2 to k over the first part `warm` of the steps and stays there; where d_in / 2
is at most k it is k from the start. There is no auxiliary term. The loss is the source's as it
stands: for x of norm √d it is about FVU / √d.

Export. The decoder's norms go into the encoder: W_enc[i] and b_enc[i] times ν_i, W_dec[i] over ν_i.
The folded scores are a_i · ν_i, what training ranks by; TopK(k) on them is the code of training's
last steps. With `jumprelu` the code is {i: a_i · ν_i > θ} instead, with one θ for all latents: the
(tokens · k)-th largest positive a_i · ν_i of a calibration batch. So θ is compared with *folded*
scores and needs no change when the norms are folded; compared with a_i itself it would be wrong. It
is in the units of training: for weights that read and write the model's units it has to be divided
by the scale of the output's transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saert.activations import Activation, JumpReLU, TopK
from saert.train.dictionary import Dictionary, widen
from saert.train.objectives.base import (
    Batch,
    Loss,
    Objective,
    Step,
    summarise,
    unexplained,
)
from saert.train.selection import batch_largest

SMALLEST_NORM = 1e-4
"""‖x − x̄‖ counts as at least this: a token at the mean would divide by zero."""


@dataclass(frozen=True)
class LlamaScopeObjective(Objective):
    """k latents a token, once annealed. `jumprelu`: whether to export JumpReLU(θ), or TopK(k)."""

    name: ClassVar[str] = "llama_scope"
    normalise: ClassVar[str] = "sqrt_d"
    unit_decoder: ClassVar[bool] = False
    subtract_b_dec: ClassVar[bool] = False
    decoder_norm: ClassVar[float] = 0.5
    lr: ClassVar[float] = 8e-4
    betas: ClassVar[tuple[float, float]] = (0.9, 0.9999)
    k: int = 50
    warm: float = 0.1
    jumprelu: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"llama_scope: k is {self.k}, expected at least 1")
        if not 0 <= self.warm <= 1:
            raise ValueError(
                f"llama_scope: warm is {self.warm}, expected a part of the steps, in [0, 1]"
            )

    def k_at(self, step: Step, d_in: int) -> int:
        """K_t. In whole numbers: a rounded d / (2k) · k may lie above d / 2, and ⌈⌉ adds one."""
        warm = round(self.warm * step.steps)
        if step.number >= warm:
            return self.k
        twice = d_in * (warm - step.number) + 2 * self.k * step.number
        return max(self.k, -(-twice // (2 * warm)))

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        k = self.k_at(step, d.d_in)
        code = d.topk(batch.x, k, weight=d.decoder_norm().detach())
        reconstruction = d.decode(code, batch.x)
        mean = d.mesh.sum_tokens(batch.y.sum(0)) / batch.tokens
        norm = (batch.y - mean).norm(dim=-1).clamp_min(SMALLEST_NORM)
        errors = (reconstruction - batch.y).square().mean(-1) / norm
        fvu = unexplained(batch.y, reconstruction.detach(), batch.variance)
        total = errors.sum() / batch.tokens
        parts = {"error": total.detach(), "k": total.new_tensor(k / d.mesh.replicas)}
        return Loss(total, fvu, *summarise(d, code), parts)

    @torch.no_grad()
    def calibrate(self, d: Dictionary, batch: Batch) -> None:
        norm = d.decoder_norm()

        def best(width: int) -> tuple[Tensor, Tensor]:
            code = widen(d.best(batch.x, width, weight=norm), width)
            return code.indices, code.values * norm[code.indices]

        *_, least = batch_largest(best, batch.tokens, self.k, d.local, d.mesh)
        d.state["threshold"] = least

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        if not self.jumprelu:
            return TopK(self.k)
        if "state.threshold" not in whole:
            raise ValueError(
                "llama_scope: no threshold yet; found " + ", ".join(whole) + "; call `calibrate` "
                "before exporting, or set jumprelu = false for TopK"
            )
        return JumpReLU(whole["state.threshold"])
