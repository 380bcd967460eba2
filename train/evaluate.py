"""What an SAE keeps, on text that nothing was trained on.

    FVU = Σ‖y − ŷ‖² / Σ‖y − ȳ‖²        CE recovered = (CE_zero − CE_spliced) / (CE_zero − CE)
    KL = mean KL(model ‖ spliced)      KL recovered = 1 − KL_spliced / KL_zero

Sums are streamed in float64 with Σ‖y − ȳ‖² = Σ‖y‖² − ‖Σy‖²/N (ALGORITHMS.md 1.7). Positions that
are left out (special tokens) are not measured, and a splice leaves them alone; cross-entropy and KL
are means over every predicted token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saert.hookpoint import Hookpoint
from saert.hooks import hooked
from saert.kernels.numerics import accumulation_dtype
from saert.sae import SAE
from saert.train.objectives.base import ALIVE

DENSITY_EDGES = tuple(-6 + 0.5 * i for i in range(13))
"""log10 of the fraction of tokens at which a latent is active: the edges of `density`, to 0."""


@dataclass(frozen=True)
class Metrics:
    """Attributes:
    fvu, l0: fraction of variance unexplained, active latents per token.
    dead: the fraction of latents that never exceed 1e-3 in `tokens` tokens.
    ce, ce_spliced, ce_zero: next-token cross-entropy of the model as it is, with the
        reconstruction spliced in, and with zeros, in nats per token.
    kl_spliced, kl_zero: KL divergence from the model as it is, in nats per token.
    density: latents per bin of DENSITY_EDGES; those that are never active are in none.
    """

    fvu: float
    l0: float
    dead: float
    ce: float
    ce_spliced: float
    ce_zero: float
    ce_recovered: float
    kl_spliced: float
    kl_zero: float
    kl_recovered: float
    tokens: int
    density: tuple[int, ...]


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
def evaluate(
    model: Any,
    sae: SAE,
    rows: Tensor,
    batch: int = 16,
    special: Callable[[Tensor], Tensor] | None = None,
) -> Metrics:
    """Metrics on rows of token ids `[rows, context]`; `special`: rows -> bool, positions to leave
    out. The rows and the SAE go to the model's device."""
    assert sae.hookpoint is not None
    read, write = sae.hookpoint, sae.target_hookpoint or sae.hookpoint
    device = next(model.parameters()).device
    unexplained = Unexplained()
    count = torch.zeros(sae.num_latents, dtype=torch.float64)
    fired = torch.zeros(sae.num_latents, dtype=torch.bool)
    sums: dict[str, float] = {}
    for part in rows.split(batch):
        used = torch.ones_like(part, dtype=torch.bool) if special is None else ~special(part)
        part, used = part.to(device), used.flatten().to(device)
        plain, hidden = _seen(model, part, (read, write))
        x, y = hidden[read][used].to(sae.device), hidden[write]
        code = sae.encode(x)
        reconstruction = sae.decode(code, x)
        unexplained.add(y[used].to(sae.device), reconstruction)
        fired[code.indices[code.values > ALIVE].cpu()] = True
        count += torch.bincount(code.indices[code.values > 0].cpu(), minlength=sae.num_latents)
        splice = y.masked_scatter(used[:, None], reconstruction.to(device, y.dtype))
        zeros = y.masked_fill(used[:, None], 0)
        _add(sums, "ce", cross_entropy(plain, part))
        for name, new in (("_spliced", splice), ("_zero", zeros)):
            log_q = _replaced(model, part, write, new.view(*part.shape, -1))
            _add(sums, f"ce{name}", cross_entropy(log_q, part))
            kl = F.kl_div(log_q, plain, log_target=True, reduction="none")
            _add(sums, f"kl{name}", kl.sum(dtype=torch.float64).item())
    predicted = rows.shape[0] * (rows.shape[1] - 1)
    mean = {name: value / predicted for name, value in sums.items()}
    lost, damage = mean["ce_spliced"] - mean["ce"], mean["ce_zero"] - mean["ce"]
    density = (count[count > 0] / unexplained.count).log10()
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    histogram = torch.histogram(density.clamp(DENSITY_EDGES[0], 0), edges).hist
    return Metrics(
        fvu=unexplained.fvu,
        l0=count.sum().item() / unexplained.count,
        dead=1 - fired.double().mean().item(),
        ce=mean["ce"],
        ce_spliced=mean["ce_spliced"],
        ce_zero=mean["ce_zero"],
        ce_recovered=1 - lost / damage,
        kl_spliced=mean["kl_spliced"],
        kl_zero=mean["kl_zero"],
        kl_recovered=1 - mean["kl_spliced"] / mean["kl_zero"],
        tokens=unexplained.count,
        density=tuple(int(n) for n in histogram),
    )


def _seen(
    model: Any, rows: Tensor, sites: Iterable[Hookpoint]
) -> tuple[Tensor, dict[Hookpoint, Tensor]]:
    """Log-probabilities of each next token, and the hidden states [tokens, d], in one pass."""
    hidden: dict[Hookpoint, Tensor] = {}

    def keep(site: Hookpoint) -> Callable[[Tensor], None]:
        return lambda state: hidden.__setitem__(site, state.flatten(0, -2).clone())

    with ExitStack() as hooks:
        for site in dict.fromkeys(sites):
            hooks.enter_context(hooked(model, site, keep(site)))
        return _log_probabilities(model, rows), hidden


def _replaced(model: Any, rows: Tensor, site: Hookpoint, hidden: Tensor) -> Tensor:
    with hooked(model, site, lambda _: hidden):
        return _log_probabilities(model, rows)


def _log_probabilities(model: Any, rows: Tensor) -> Tensor:
    """[rows, context − 1, vocabulary], in float32 or wider."""
    logits: Tensor = model(rows, use_cache=False).logits[:, :-1]
    return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)


def cross_entropy(log_p: Tensor, rows: Tensor) -> float:
    """Summed next-token cross-entropy of rows `[rows, context]`, in nats."""
    return F.nll_loss(log_p.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value
