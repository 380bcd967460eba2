"""JumpReLU (Rajamanoharan et al. 2024b; ALGORITHMS.md 3).

    a = W_enc (x − b_dec) + b_enc,    f = a · H(a − θ),    x̂ = Σ f_i W_dec[i] + b_dec
    L = FVU(x̂, x) + λ · L0,           L0 = mean over tokens of Σ H(a_i − θ_i)
    or, for a wanted L0:              L = FVU(x̂, x) + λ · h(L0 / target − 1)

H has no gradient; the thresholds learn by pseudo-derivatives, a kernel estimate of the gradient of
the expected loss, with the window K(u) = 1[|u| < ½] of width ε around θ:

    f:   ∂/∂a = H(a − θ),    ∂/∂θ = −(θ/ε) · K((a − θ)/ε)
    H:   ∂/∂a = 0,           ∂/∂θ = −(1/ε) · K((a − θ)/ε)

Both look at the pre-activations a. (dictionary_learning gives H the activations f, which are 0 for
a ≤ θ, and so loses the lower half of the window.) The parameter is ln θ; its gradient has the
factor θ from autograd, beside the rule's own.

A target L0. h(e) is e² (dictionary_learning) up to |e| = 0.1, then 0.1 · (2|e| − 0.1), straight on.
The square leaves L0 above its target by about the part −target · dFVU/dL0 / 2λ, a few per cent.
The straight part is ours: Adam divides by the root mean square of the gradients so far, so that
those of a square far from its target would slow θ down later.

Where θ starts. The papers start at θ = ε = 0.001. Adam moves ln θ by at most about the rate a step,
so a short run cannot leave there: after 390 steps θ was 0.004 and L0 299, for a target of 16
(LOG.md). With a target, θ therefore starts, and this is ours, at the level above which the first
batch has that L0, or at 0.001 if that is more. ε is the start of θ here too, so that the window
keeps its part of the activations: in a much narrower one a small batch has none, and θ stays where
it is. L0 still moves while the dictionary learns, and runs of a few hundred steps end up to a tenth
from the target. Training that goes on from a JumpReLU SAE starts at its θ instead, and ε is their
median (or 0.001). `threshold` = `bandwidth` = 0.001 is what the papers do.

The paper's loss is ours times σ² = mean of ‖x − x̄‖², with λ′ = λ·σ². θ and ε are in the units of
x, and the defaults are meant for the input transform "unit" (mean of ‖x‖² = 1). Subtracting b_dec
is optional and changes nothing but the start. λ rises linearly over the first part `warm` of the
steps.

A dead latent gets no gradient at all. `pre_act` > 0 adds, for dead latents only (as SAELens;
Anthropic has it for all), pre_act · mean over tokens of Σ ReLU(θ_i − a_i) / σ. Theirs is 3e-6 on
ReLU(θ − a) itself, beside the sum of squared errors; Adam makes its size unimportant, as nothing
else moves those latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saert.activations import Activation, JumpReLU
from saert.train.dictionary import Dictionary
from saert.train.objectives.base import (
    Batch,
    Loss,
    Objective,
    Step,
    folded,
    summarise_dense,
    unexplained,
)
from saert.train.objectives.sparsity import check, spread, warmed_up

NEAR = 0.1
"""Up to which |L0 / target − 1| the penalty is a square."""

PUBLISHED_START = 0.001
"""θ at the first step, and ε, where the mean of ‖x‖² is 1."""


class _Jump(torch.autograd.Function):
    """f = a · H(a − θ)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
        ctx.save_for_backward(a, threshold)
        ctx.bandwidth = bandwidth
        return a * (a > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, threshold = ctx.saved_tensors
        inside = _window(a, threshold, ctx.bandwidth)
        by_threshold = -(threshold / ctx.bandwidth) * (grad * inside).sum(0)
        return grad * (a > threshold), by_threshold, None


class _Step(torch.autograd.Function):
    """H(a − θ)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
        ctx.save_for_backward(a, threshold)
        ctx.bandwidth = bandwidth
        return (a > threshold).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        a, threshold = ctx.saved_tensors
        inside = _window(a, threshold, ctx.bandwidth)
        return None, -(grad * inside).sum(0) / ctx.bandwidth, None


def _window(a: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    return (a - threshold).abs() < bandwidth / 2


def jump(a: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    """a · H(a − θ), a [T, local] and θ [local], with the pseudo-derivative of the docstring."""
    return _Jump.apply(a, threshold, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def step_above(a: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    """H(a − θ), a [T, local] and θ [local], with the pseudo-derivative of the docstring."""
    return _Step.apply(a, threshold, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class JumpReLUObjective(Objective):
    """λ = `l0` (None: 1e-3, or 5 with a `target_l0`); θ starts at `threshold` (None: 0.001, or with
    a target where the first batch has that L0); ε = `bandwidth` (None: where θ starts, which
    for a saved SAE's thresholds is their median)."""

    name: ClassVar[str] = "jumprelu"
    normalise: ClassVar[str] = "unit"
    lr: ClassVar[float] = 7e-5
    betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    l0: float | None = None
    target_l0: float | None = None
    warm: float = 0.05
    threshold: float | None = None
    bandwidth: float | None = None
    pre_act: float = 0.0

    def __post_init__(self) -> None:
        check(
            self.name,
            warm=self.warm,
            target_l0=self.target_l0,
            l0=self.coefficient,
            threshold=self.threshold,
            bandwidth=self.bandwidth,
        )
        if not self.pre_act >= 0:
            raise ValueError(f"jumprelu: pre_act is {self.pre_act}, expected at least 0")

    @property
    def coefficient(self) -> float:
        """λ, after its warm-up."""
        if self.l0 is not None:
            return self.l0
        return 1e-3 if self.target_l0 is None else 5.0

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        start = self._start(d, batch)
        bandwidth = start if self.bandwidth is None else self.bandwidth
        d.extra["log_threshold"] = nn.Parameter(torch.full_like(d.b_enc, math.log(start)))
        d.state["bandwidth"] = d.b_enc.new_tensor(bandwidth)

    def _start(self, d: Dictionary, batch: Batch) -> float:
        """θ at the first step, of all latents."""
        if self.threshold is not None:
            return self.threshold
        if self.target_l0 is None:
            return PUBLISHED_START
        _, least = d.batch_topk(batch.x, max(1, round(self.target_l0)), batch.tokens)
        return max(PUBLISHED_START, least.item())

    @torch.no_grad()
    def adopt(self, d: Dictionary, activation: Activation) -> None:
        super().adopt(d, activation)
        if isinstance(activation, JumpReLU):
            threshold = folded(d, activation.threshold)
            d.extra["log_threshold"].copy_(threshold[d.latents].clamp_min(1e-12).log())
            if self.bandwidth is None and self.threshold is None:
                middle = max(PUBLISHED_START, threshold.median().item())
                d.state["bandwidth"] = d.b_enc.new_tensor(middle)

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        a, threshold = d.scores(batch.x), d.extra["log_threshold"].exp()
        f = jump(a, threshold, d.state["bandwidth"])
        fvu = unexplained(batch.y, d.decode_dense(f, batch.x), batch.variance)
        l0 = step_above(a, threshold, d.state["bandwidth"]).sum() / batch.tokens
        weight = self.coefficient * warmed_up(step, self.warm)
        total = fvu + weight * (l0 if self.target_l0 is None else self._missed(d, l0))
        mean_threshold = threshold.detach().sum() / (d.num_latents * d.mesh.replicas)
        parts = {"threshold": d.mesh.sum_latents(mean_threshold)}
        if self.pre_act:
            below = (threshold - a).relu().sum(0)[step.dead].sum()
            below = below / (spread(batch) * batch.tokens)
            total = total + self.pre_act * below
            parts["pre_act"] = d.mesh.sum_latents(below.detach())
        return Loss(total, fvu.detach(), *summarise_dense(f), parts)

    def _missed(self, d: Dictionary, l0: Tensor) -> Tensor:
        """A replica's share of h(L0 / target − 1), L0 the whole batch's, by l0, this process's."""
        assert self.target_l0 is not None
        whole = d.mesh.sum_tokens(d.mesh.sum_latents(l0.detach()))
        excess = whole / self.target_l0 - 1
        slope = 2 * (l0 - l0.detach()) / self.target_l0  # 0, but for its gradient
        near = excess.clamp(-NEAR, NEAR)
        return near * ((2 * excess - near) / d.mesh.replicas + slope)

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return JumpReLU(whole["extra.log_threshold"].exp())
