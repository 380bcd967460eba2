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
from saert.train.objectives.base import Batch, Step
from saert.train.schedule import trapezoid

LEAST, MOST = 1e-6, 1e2
"""Where c stays. λ is a pure number: below, it does nothing; above, no latent is worth its cost."""


def warmed_up(step: Step, warm: float) -> float:
    """λ's factor: up linearly over the first part `warm` of the steps, then 1."""
    return trapezoid(step.number, step.steps, round(warm * step.steps), 0.0)


def spread(batch: Batch) -> Tensor:
    """σ, the root mean square of ‖y − ȳ‖: penalised activations are measured in it."""
    return (batch.variance / batch.tokens).sqrt()


@torch.no_grad()
def coefficient(
    d: Dictionary,
    batch: Batch,
    step: Step,
    f: Tensor,
    *,
    warm: float,
    target_l0: float | None,
    gain: float,
) -> Tensor:
    """λ of this step. f [T, local]: this process's activations."""
    c = d.state["coefficient"]
    if target_l0 is None or step.number < round(warm * step.steps):
        return c * warmed_up(step, warm)
    active = d.mesh.sum_tokens(d.mesh.sum_latents((f > 0).sum().double()))
    excess = (active / (batch.tokens * target_l0)).log().clamp(-1, 1).to(c.dtype)
    d.state["coefficient"] = (c * (gain / step.steps * excess).exp()).clamp(LEAST, MOST)
    return d.state["coefficient"] * excess.exp()


def check(objective: str, *, warm: float, target_l0: float | None, **positive: float) -> None:
    """Raise ValueError for hyper-parameters that mean nothing."""
    if not 0 <= warm <= 1:
        raise ValueError(f"{objective}: warm is {warm}, expected a part of the steps, in [0, 1]")
    if target_l0 is not None:
        positive["target_l0"] = target_l0
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{objective}: {name} is {value}, expected a positive number")
