"""The numbers that training keeps of a dictionary: one short record, from one pass over text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saert.measure.passes import Special
from saert.measure.reports.downstream import recovered
from saert.measure.reports.splices import splices
from saert.sae import SAE


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


def evaluate(
    model: Any, sae: SAE, rows: Tensor, batch: int = 16, special: Special | None = None
) -> Metrics:
    """Metrics on rows of token ids int64 `[rows, context]`; the definitions are those of
    `reconstruction_report` and `downstream_report`.

    `special`: rows -> bool, positions that are not measured, and that a splice leaves alone;
    cross-entropy and KL are means over every predicted token. The rows go to the model's device.
    Raises what the two reports raise.
    """
    (found,) = splices(model, [sae], rows, means=None, batch=batch, special=special, progress=False)
    seen = found.reconstruction.report()
    sums = (one.sums.sum(0).tolist() for one in (found.clean, found.spliced, found.zero))
    (n, ce, *_), (_, spliced, kl, _), (_, zero, kl_zero, _) = sums
    return Metrics(
        fvu=seen.fvu,
        l0=seen.l0,
        dead=seen.dead,
        ce=ce / n,
        ce_spliced=spliced / n,
        ce_zero=zero / n,
        ce_recovered=recovered(spliced, ce, zero),
        kl_spliced=kl / n,
        kl_zero=kl_zero / n,
        kl_recovered=recovered(kl, 0, kl_zero),
        tokens=seen.tokens,
        density=seen.density,
    )
