"""What an SAE keeps: FVU, L0, dead latents, and the cross-entropy that the model keeps with it.

    FVU = Σ‖y − ŷ‖² / Σ‖y − ȳ‖²        CE recovered = (CE_zero − CE_spliced) / (CE_zero − CE)

Sums are streamed in float64 with Σ‖y − ȳ‖² = Σ‖y‖² − ‖Σy‖²/N (ALGORITHMS.md 1.7). Every position
counts, the first of each row included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.train.activations import capture, hooked
from saert.train.objectives.topk import ALIVE


@dataclass(frozen=True)
class Metrics:
    """`dead`: the fraction of latents that never fire in `tokens`. Cross-entropies in nats."""

    fvu: float
    l0: float
    dead: float
    ce: float
    ce_spliced: float
    ce_zero: float
    ce_recovered: float
    tokens: int


class Unexplained:
    """Streams FVU over batches of targets and reconstructions `[tokens, d]`."""

    def __init__(self) -> None:
        self.error, self.square, self.count = 0.0, 0.0, 0
        self.sum: Tensor | float = 0.0

    def add(self, target: Tensor, reconstruction: Tensor) -> None:
        y = target.double()
        self.error += (y - reconstruction.double()).square().sum().item()
        self.square += y.square().sum().item()
        self.sum = self.sum + y.sum(0)
        self.count += len(y)

    @property
    def fvu(self) -> float:
        centre = torch.as_tensor(self.sum).square().sum().item() / self.count
        return self.error / (self.square - centre)


@torch.no_grad()
def evaluate(model: Any, sae: SAE, rows: Tensor, batch: int = 16) -> Metrics:
    """Metrics on rows of token ids `[rows, context]` that neither model nor SAE was trained on."""
    assert sae.hookpoint is not None
    read, write = sae.hookpoint, sae.target_hookpoint or sae.hookpoint
    unexplained = Unexplained()
    fired = torch.zeros(sae.num_latents, dtype=torch.bool)
    active = 0
    nats = {"plain": 0.0, "spliced": 0.0, "zero": 0.0}
    for part in rows.split(batch):
        hidden = capture(model, part, list(dict.fromkeys((read, write))))
        code = sae.encode(hidden[read])
        unexplained.add(hidden[write], sae.decode(code, hidden[read]))
        fired[code.indices[code.values > ALIVE]] = True
        active += int(code.l0().sum())
        reconstruction = sae.decode(code, hidden[read]).view(*part.shape, -1)
        nats["plain"] += cross_entropy(model, part)
        nats["spliced"] += _replaced(
            model, part, write, partial(torch.Tensor.type_as, reconstruction)
        )
        nats["zero"] += _replaced(model, part, write, torch.zeros_like)
    predicted = rows.shape[0] * (rows.shape[1] - 1)
    ce, spliced, zero = (nats[name] / predicted for name in ("plain", "spliced", "zero"))
    return Metrics(
        fvu=unexplained.fvu,
        l0=active / unexplained.count,
        dead=1 - fired.double().mean().item(),
        ce=ce,
        ce_spliced=spliced,
        ce_zero=zero,
        ce_recovered=(zero - spliced) / (zero - ce),
        tokens=unexplained.count,
    )


def cross_entropy(model: Any, rows: Tensor) -> float:
    """Summed next-token cross-entropy of rows `[rows, context]`, in nats."""
    logits = model(rows, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()


def _replaced(
    model: Any, rows: Tensor, hookpoint: Hookpoint, act: Callable[[Tensor], Tensor]
) -> float:
    with hooked(model, hookpoint, act):
        return cross_entropy(model, rows)
