"""ReLU with an L1 penalty, the baseline (Bricken et al. 2023; Cunningham et al. 2023).

    f = ReLU(W_enc (x − b_dec) + b_enc),    x̂ = Σ f_i W_dec[i] + b_dec,    ‖W_dec[i]‖ = 1
    L = FVU(x̂, x) + λ · mean over tokens of Σ f_i / σ,    σ² = mean of ‖x − x̄‖²

λ is a pure number: a latent of strength a·σ pays for itself if a > λ, and is shrunk by λ·σ/2. The
papers' mean of ‖x − x̂‖² + λ′ Σ f_i has λ′ = λ·σ, in the units of x; under the input transform
"unit" σ is at most 1. λ rises linearly over the first part `warm` of the steps; with a `target_l0`
it is controlled from then on (`saert.train.objectives.sparsity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saert.activations import Activation, ReLU
from saert.train.dictionary import Dictionary
from saert.train.objectives.base import Batch, Loss, Step, summarise_dense, unexplained
from saert.train.objectives.sparsity import L1Objective


@dataclass(frozen=True)
class ReLUL1Objective(L1Objective):
    """λ = `l1`; with a `target_l0`, where λ starts. `gain`: of λ's control."""

    name: ClassVar[str] = "relu_l1"
    normalise: ClassVar[str] = "unit"
    l1: float = 0.05
    warm: float = 0.05
    target_l0: float | None = None
    gain: float = 20.0

    def loss(self, d: Dictionary, batch: Batch, step: Step) -> Loss:
        f = d.scores(batch.x).relu()
        fvu = unexplained(batch.y, d.decode_dense(f, batch.x), batch.variance)
        penalty, parts = self.penalty(d, batch, step, f, shrunk=f)
        return Loss(fvu + penalty, fvu.detach(), *summarise_dense(f), parts)

    def activation(self, whole: Mapping[str, Tensor]) -> Activation:
        return ReLU()
