"""An SAE and other readings of it on the hidden states of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hooks import device_of
from saert.hub.verifying.diagnosis import Tried
from saert.hub.verifying.fit import Fit, Fitting, fit, reconstructed
from saert.hub.verifying.readings import Reading, exists
from saert.hub.verifying.verify_text import Rows
from saert.sae import SAE

BATCH = 16  # rows of one forward pass
SAMPLE = 512  # tokens that other readings are tried on
OUTLIER = 10.0  # times the median norm (Qwen3 SAEs are trained without such tokens)


@dataclass(frozen=True)
class Sample:
    """The used tokens of the first rows: hidden [tokens, d] at several places, x and y among
    them."""

    hidden: dict[Hookpoint, Tensor]
    pairs: list[tuple[Hookpoint, Hookpoint]]
    x: Tensor
    y: Tensor


def sample_of(
    model: Any,
    text: Rows,
    sae: SAE,
    pairs: Sequence[tuple[Hookpoint, Hookpoint]],
    read: Hookpoint,
    write: Hookpoint,
) -> Sample:
    kept = [(r, w) for r, w in pairs if exists(model, r, sae.d_in) and exists(model, w, sae.d_out)]
    count = int((text.used.sum(1).cumsum(0) < SAMPLE).sum()) + 1
    used = text.used[:count].flatten()
    wanted = list(dict.fromkeys((read, write, *(one for pair in kept for one in pair))))
    hidden = capture(model, text.ids[:count].to(device_of(model)), wanted, batch=BATCH)
    x, y = hidden[read], hidden[write]
    used = used.to(x.device)
    used &= _ordinary(x, y, _limits(x, y, used))
    chosen = used.nonzero().flatten()[:SAMPLE]
    hidden = {at: h[chosen.to(h.device)].to(sae.device) for at, h in hidden.items()}
    return Sample(hidden, kept, hidden[read], hidden[write])


def tried_on(sample: Sample, readings: Iterable[Reading]) -> list[Tried]:
    """Readings whose numbers are finite, with their fits."""
    found = []
    for one in readings:
        with suppress(ValueError):  # NaN scores: a reading that cannot be meant
            fitted = fit(one.sae, sample.hidden[one.read], sample.hidden[one.write])
            if math.isfinite(fitted.fvu):
                found.append(Tried(one.kind, one.what, fitted))
    return found


def measure(sae: SAE, model: Any, text: Rows, read: Hookpoint, write: Hookpoint) -> tuple[Fit, Fit]:
    """The fit over used tokens, and over all that are no padding."""
    used, everywhere = Fitting(sae), Fitting(sae)
    limits: tuple[float, float] | None = None
    parts = (t.split(BATCH) for t in (text.ids, text.used, text.real))
    for ids, counted, real in zip(*parts, strict=True):
        hidden = capture(model, ids.to(device_of(model)), (read, write), batch=BATCH)
        x, y = (hidden[at].to(sae.device) for at in (read, write))
        counted, real = (t.flatten().to(sae.device) for t in (counted, real))
        limits = limits or _limits(x, y, counted)
        counted = counted & _ordinary(x, y, limits)
        for part, code, estimate in reconstructed(sae, x):
            for fitting, mask in ((used, counted[part]), (everywhere, real[part])):
                fitting.add(y[part][mask], estimate[mask], code[mask])
    return used.fit(), everywhere.fit()


def _limits(x: Tensor, y: Tensor, used: Tensor) -> tuple[float, float]:
    """The longest hidden states that count, read and written."""
    if not used.any():
        return math.inf, math.inf
    longest = [OUTLIER * t[used].float().norm(dim=-1).median().item() for t in (x, y)]
    return longest[0], longest[1]


def _ordinary(x: Tensor, y: Tensor, limits: tuple[float, float]) -> Tensor:
    """bool [tokens]: not the few massive states that some models keep at delimiters."""
    reads, writes = (t.float().norm(dim=-1) for t in (x, y))
    return torch.logical_and(reads <= limits[0], writes <= limits[1])
