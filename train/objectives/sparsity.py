"""What the penalised objectives share: λ's warm-up, and λ as the means to a wanted L0.

A penalty's weight says little about the L0 that training ends with. With a `target_l0`, λ is
controlled from the end of its warm-up on, by a proportional and an integral part:

    λ = c · exp(e),    c ← c · exp(gain / steps · e),    e = clip(ln(L0 / target), −1, 1)

L0 is the batch's mean number of active latents; the last c is d.state["coefficient"]. The integral
part moves by `gain` e-folds over a run in which L0 is e times the target: enough to cross any
sensible start, and slow beside the some hundred steps by which L0 follows λ. Runs of fewer than
about 300 steps are too short for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saert.train.dictionary import Dictionary
from saert.train.objectives.base import Batch, Objective, Step
from saert.train.schedule import trapezoid

LEAST, MOST = 1e-6, 1e2
"""Where c stays. λ is a pure number: below, it does nothing; above, no latent is worth its cost."""


def warmed_up(step: Step, warm: float) -> float:
    """λ's factor: up linearly over the first part `warm` of the steps, then 1."""
    return trapezoid(step.number, step.steps, round(warm * step.steps), 0.0)


def spread(batch: Batch) -> Tensor:
    """σ, the root mean square of ‖y − ȳ‖: penalised activations are measured in it."""
    return (batch.variance / batch.tokens).sqrt()


def check(objective: str, *, warm: float, **positive: float | None) -> None:
    """Raise ValueError for hyper-parameters that mean nothing; None is one that is left open."""
    if not 0 <= warm <= 1:
        raise ValueError(f"{objective}: warm is {warm}, expected a part of the steps, in [0, 1]")
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{objective}: {name} is {value}, expected a positive number")


class L1Objective(Objective):
    """λ = `l1`, warmed up and controlled as above. A subclass declares the four as its fields."""

    l1: float
    warm: float
    target_l0: float | None
    gain: float

    def __post_init__(self) -> None:
        check(self.name, warm=self.warm, target_l0=self.target_l0, l1=self.l1, gain=self.gain)

    def prepare(self, d: Dictionary, batch: Batch) -> None:
        d.state["coefficient"] = d.b_enc.new_tensor(self.l1)

    def penalty(
        self, d: Dictionary, batch: Batch, step: Step, f: Tensor, shrunk: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """λ · mean over tokens of Σ shrunk_i / σ, and its parts for the log; L0 is that of f.
        f and shrunk [T, local]."""
        l1 = shrunk.sum() / (spread(batch) * batch.tokens)
        weight = self._coefficient(d, batch, step, f)
        logged = {"l1": d.mesh.sum_latents(l1.detach()), "coefficient": weight / d.mesh.replicas}
        return weight * l1, logged

    @torch.no_grad()
    def _coefficient(self, d: Dictionary, batch: Batch, step: Step, f: Tensor) -> Tensor:
        """λ of this step."""
        c = d.state["coefficient"]
        if self.target_l0 is None or step.number < round(self.warm * step.steps):
            return c * warmed_up(step, self.warm)
        active = d.mesh.sum_tokens(d.mesh.sum_latents((f > 0).sum().double()))
        excess = (active / (batch.tokens * self.target_l0)).log().clamp(-1, 1).to(c.dtype)
        d.state["coefficient"] = (c * (self.gain / step.steps * excess).exp()).clamp(LEAST, MOST)
        return d.state["coefficient"] * excess.exp()
