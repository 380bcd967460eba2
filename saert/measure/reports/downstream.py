"""What a language model loses when an SAE's reconstruction takes the place of its hidden state.

    CE recovered = (CE_base − CE_spliced) / (CE_base − CE),   base: zeros, or the mean activation
    KL = mean over positions of KL(model ‖ model with the hidden state replaced), in nats

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (ALGORITHMS.md 1.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saert.measure.passes import Special, sites
from saert.measure.reports.reconstruction import ReconstructionReport
from saert.measure.reports.splices import Outcome, either, mean_states, splices
from saert.sae import SAE


@dataclass(frozen=True)
class Losses:
    """Means over positions, in nats. A position predicts the token after it.

    Attributes:
        tokens: positions.
        ce, ce_spliced, ce_zero, ce_mean: next-token cross-entropy of the model as it is, and with
            the reconstruction, zeros, or the mean activation in place of the hidden state.
        kl_spliced, kl_zero, kl_mean: KL divergence from the model as it is.
        delta_ce: ce_spliced − ce.
        ce_recovered, ce_recovered_mean: (base − ce_spliced) / (base − ce), base ce_zero or
            ce_mean. 1: nothing is lost; 0: as bad as the baseline. Says nothing, and may have any
            sign, where the baseline does no harm.
        kl_recovered, kl_recovered_mean: 1 − kl_spliced / kl_zero, or / kl_mean.
        agreement: how often the spliced model's likeliest token is the model's.
    """

    tokens: int
    ce: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl_spliced: float
    kl_zero: float
    kl_mean: float
    delta_ce: float
    ce_recovered: float
    ce_recovered_mean: float
    kl_recovered: float
    kl_recovered_mean: float
    agreement: float


@dataclass(frozen=True)
class LossesAt(Losses):
    """At positions `start` to `stop` (exclusive) of the rows, the first token being 0."""

    start: int
    stop: int


@dataclass(frozen=True)
class DownstreamReport(Losses):
    """Losses over all positions, and by position: how an SAE does in contexts longer than it was
    trained on. Weighted with their tokens, the buckets' losses add up to the total."""

    positions: tuple[LossesAt, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """Both reports on one SAE."""

    reconstruction: ReconstructionReport
    downstream: DownstreamReport

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def downstream_report(
    model: Any,
    sae: SAE,
    rows: Tensor,
    *,
    batch: int = 16,
    special: Special | None = None,
    padding: Special | None = None,
    buckets: Sequence[int] | None = None,
    progress: bool = True,
) -> DownstreamReport:
    """What the model loses when the SAE's reconstruction replaces its hidden state.

    Args:
        rows: int64 [rows, context], token ids; pad on the right.
        batch: rows at a time, at most (fewer where the logits would be large). The numbers do not
            depend on it.
        special: rows -> bool of the same shape, tokens whose hidden state stays as it is, for the
            baselines too. What they predict, and their prediction, still count.
        padding: rows -> bool, tokens that are no text: as `special`, and no prediction from or of
            them counts.
        buckets: as in `reconstruction_report`.

    Raises:
        TypeError, ValueError: as `reconstruction_report`, and rows of fewer than two tokens.
    """
    (found,) = measure(
        model,
        [sae],
        rows,
        batch=batch,
        special=special,
        padding=padding,
        buckets=buckets,
        progress=progress,
    )
    return found.downstream


def measure(
    model: Any,
    saes: Sequence[SAE],
    rows: Tensor,
    *,
    batch: int = 16,
    special: Special | None = None,
    padding: Special | None = None,
    buckets: Sequence[int] | None = None,
    progress: bool = True,
) -> list[Measured]:
    """`reconstruction_report` and `downstream_report` of several SAEs.

    They share the passes of the model as it is and, where they write to one place, of its
    baselines; a first pass for the mean activations stops at the last hookpoint. Arguments as
    `downstream_report`.
    """
    places = list(dict.fromkeys(sites(sae)[1] for sae in saes))
    left_out = either(special, padding)
    means = mean_states(model, places, rows, batch=batch, special=left_out, progress=progress)
    found = splices(
        model,
        saes,
        rows,
        means=means,
        batch=batch,
        special=special,
        padding=padding,
        buckets=buckets,
        progress=progress,
    )
    return [Measured(one.reconstruction.report(), _report(one)) for one in found]


def _report(found: Outcome) -> DownstreamReport:
    assert found.mean is not None
    effects = (found.clean, found.spliced, found.zero, found.mean)
    sums = torch.stack([effect.sums for effect in effects])  # [4, buckets, 4]
    if not sums[0, :, 0].any():
        raise ValueError("no prediction is left to measure: every row is padding")
    if not sums.isfinite().all():
        raise ValueError(f"the model's losses around {found.reconstruction.where} have NaN or inf")
    return DownstreamReport(
        **_losses(sums.sum(1)),
        positions=tuple(
            LossesAt(**_losses(sums[:, i]), start=start, stop=stop)
            for i, (start, stop) in enumerate(found.clean.buckets)
            if sums[0, i, 0]
        ),
    )


def _losses(sums: Tensor) -> dict[str, Any]:
    """The fields of `Losses` from sums [clean spliced zero mean, tokens ce kl agreement]."""
    tokens = sums[0, 0].item()
    (ce, _), (spliced, kl), (zero, kl_zero), (mean, kl_mean) = (sums[:, 1:3] / tokens).tolist()
    return {
        "tokens": int(tokens),
        "ce": ce,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": mean,
        "kl_spliced": kl,
        "kl_zero": kl_zero,
        "kl_mean": kl_mean,
        "delta_ce": spliced - ce,
        "ce_recovered": recovered(spliced, ce, zero),
        "ce_recovered_mean": recovered(spliced, ce, mean),
        "kl_recovered": recovered(kl, 0, kl_zero),
        "kl_recovered_mean": recovered(kl, 0, kl_mean),
        "agreement": sums[1, 3].item() / tokens,
    }


def recovered(value: float, best: float, base: float) -> float:
    """(base − value) / (base − best); NaN if base = best."""
    return 1 - (value - best) / (base - best) if base != best else float("nan")
