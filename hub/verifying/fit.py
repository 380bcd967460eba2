"""How well one way of reading an SAE's weights fits hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saert.activations import AbsTopK, GroupMax, TopK
from saert.sae import SAE
from saert.sparse import SparseCode

CELLS = 1 << 24  # tokens x latents of one code: a TopK read as a ReLU keeps half of them


@dataclass(frozen=True)
class Fit:
    """Attributes:
    tokens: how many.
    fvu: Σ‖y − ŷ‖² / Σ‖y − ȳ‖² (Gao et al. 2024).
    l0: mean number of active latents; l0_low, l0_high: the 5th and 95th percentile of tokens.
    silent: the share of tokens without an active latent.
    full: the share of tokens with k active latents (NaN for activations without a k).
    norm_ratio: mean of ‖ŷ‖ / ‖y‖ over tokens with y ≠ 0.
    gain, affine_fvu: the factor that makes ŷ − mean(ŷ) fit y − ȳ best, and the FVU with it.
    idle: the share of latents that no token activates. Few tokens leave many idle that are not
        dead.
    """

    tokens: int
    fvu: float
    l0: float
    l0_low: float
    l0_high: float
    silent: float
    full: float
    norm_ratio: float
    constant: float
    gain: float
    affine_fvu: float
    idle: float


class Fitting:
    """Streams a `Fit`; sums are float64."""

    def __init__(self, sae: SAE) -> None:
        own = sae.activation
        self.k = own.k if isinstance(own, TopK | AbsTopK | GroupMax) else None
        self.fired = torch.zeros(sae.num_latents, dtype=torch.bool)
        self.l0: list[Tensor] = []
        self.sums = torch.zeros(6, dtype=torch.float64)  # see `add`
        self.target: Tensor | float = 0.0
        self.estimate: Tensor | float = 0.0

    def add(self, y: Tensor, estimate: Tensor, code: SparseCode) -> None:
        """y and estimate [tokens, d_out], code [tokens, k]."""
        y, r = y.double(), estimate.double()
        lengths = y.norm(dim=-1)
        ratio = (r.norm(dim=-1) / lengths)[lengths > 0]
        terms = ((y - r).square(), y.square(), r.square(), y * r, ratio, torch.ones_like(ratio))
        self.sums += torch.stack([term.sum() for term in terms]).cpu()
        self.target, self.estimate = self.target + y.sum(0), self.estimate + r.sum(0)
        self.l0.append(code.l0().cpu())
        self.fired[code.indices[code.values != 0].cpu()] = True

    def fit(self) -> Fit:
        l0 = torch.cat(self.l0).double()
        n = len(l0)
        error, yy, rr, yr, ratio, nonzero = self.sums.tolist()
        target, estimate = torch.as_tensor(self.target), torch.as_tensor(self.estimate)
        constant = (target - estimate).square().sum().item() / n
        yy -= target.square().sum().item() / n
        rr -= estimate.square().sum().item() / n
        yr -= (target * estimate).sum().item() / n
        low, high = l0.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        return Fit(
            tokens=n,
            fvu=_ratio(error, yy),
            l0=l0.mean().item(),
            l0_low=low,
            l0_high=high,
            silent=(l0 == 0).double().mean().item(),
            full=math.nan if self.k is None else (l0 >= self.k).double().mean().item(),
            norm_ratio=_ratio(ratio, nonzero),
            constant=_ratio(constant, error),
            gain=_ratio(yr, rr),
            affine_fvu=1 - _ratio(yr * yr, rr * yy),
            idle=1 - self.fired.double().mean().item(),
        )


def fit(sae: SAE, x: Tensor, y: Tensor) -> Fit:
    """The fit over x [tokens, d_in] read and y [tokens, d_out] to be written."""
    fitting = Fitting(sae)
    for part, code, estimate in reconstructed(sae, x):
        fitting.add(y[part], estimate, code)
    return fitting.fit()


def reconstructed(sae: SAE, x: Tensor) -> Iterator[tuple[slice, SparseCode, Tensor]]:
    """Tokens, code and reconstruction of x [tokens, d_in], a bounded part at a time."""
    step = max(1, CELLS // sae.num_latents)
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        code = sae.encode(x[part])
        yield part, code, sae.decode(code, x[part])


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
