"""A spliced loss as compute: how much pretraining a language model with that loss would have had.

    L(C) = a + b · C^(−c)          C(L) = ((L − a) / b)^(−1/c)

Gao et al. 2024, section 4.1: with a 16M-latent SAE spliced in, GPT-4's loss is that of a model with
10% of its pretraining compute (ALGORITHMS.md 1.7). The law is of *language models* on the same
text, not of SAEs (`saert.train.scaling` has those).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROUNDING = 1e-9  # how far outside a range still counts as its end


@dataclass(frozen=True)
class LossLaw:
    """The loss, in nats per token, of a language model trained with compute C.

    Attributes:
        a: the irreducible loss; b: the rest at one unit of compute; c: the exponent.
        low, high: the compute over which the law was measured. It is not trusted outside.
        rms: root mean square of the residuals of a fit, in nats; 0 for a law that was given.
    """

    a: float
    b: float
    c: float
    low: float = 0.0
    high: float = math.inf
    rms: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.a, self.b, self.c, self.low)
        if not all(map(math.isfinite, numbers)) or not (self.b > 0 and self.c > 0):
            raise ValueError(
                f"LossLaw: a {self.a}, b {self.b}, c {self.c}; expected finite numbers with b and "
                "c above 0, so that the loss falls with compute"
            )
        if not 0 <= self.low < self.high:
            raise ValueError(f"LossLaw: measured from {self.low} to {self.high}: no range")

    def loss(self, compute: float) -> float:
        """L(C), in nats per token."""
        return self.a + self.b * compute**-self.c if compute else math.inf

    def compute(self, loss: float) -> float:
        """C(L), in the unit of the law.

        Raises ValueError for a loss that no compute reaches, or that lies outside what was
        measured."""
        if not loss > self.a:  # NaN as well
            raise ValueError(
                f"a loss of {loss:.4g} is not above {self.a:.4g}, the law's irreducible loss: no "
                "amount of compute gives it; is the law one of this text and this model family?"
            )
        exponent = -math.log((loss - self.a) / self.b) / self.c
        found = math.exp(exponent) if exponent < 700 else math.inf
        if not self.low * (1 - ROUNDING) <= found <= self.high * (1 + ROUNDING):
            highest, lowest = self.loss(self.low), self.loss(self.high)
            raise ValueError(
                f"a loss of {loss:.4g} lies outside what the law was measured on, {lowest:.4g} to "
                f"{highest:.4g} (compute {self.high:.3g} to {self.low:.3g}); measure "
                f"{'smaller' if found < self.low else 'larger'} models, or widen low and high "
                "to extrapolate"
            )
        return found


def compute_equivalent(
    loss: float, law: LossLaw, *, whole: float = 1.0, model_loss: float | None = None
) -> float:
    """The fraction of a model's pretraining compute that gives an LM of this loss.

    Args:
        loss: the spliced cross-entropy, `downstream_report(…).ce_spliced`.
        whole: the model's own pretraining compute in the law's unit.
        model_loss: the model's own cross-entropy (`.ce`), in place of `whole`, whose compute the
            law then gives: the better choice where the law misses the model by a little.

    Raises:
        ValueError: a loss outside the law's range, or a `whole` that is not above 0.

    >>> law = LossLaw(a=1.7, b=1.2, c=0.05)
    >>> round(compute_equivalent(law.loss(0.1), law), 6)
    0.1
    """
    if model_loss is not None:
        whole = law.compute(model_loss)
    if not (math.isfinite(whole) and whole > 0):
        raise ValueError(f"whole is {whole}, expected the model's compute, above 0")
    return law.compute(loss) / whole


def fit_losses(compute: Sequence[float], losses: Sequence[float]) -> LossLaw:
    """L(C) = a + b·C^(−c), a ≥ 0, through losses of language models, by least squares.

    `compute` in any unit; its range is the law's. For given c the law is linear in a and b, so
    only c is searched for. Look at `rms` before you trust it.

    Raises:
        ImportError: without SciPy.
        ValueError: fewer than four different computes, numbers that are not finite and above 0,
            or losses that do not fall with compute as such a law does.
    """
    C, L = (np.asarray(x, dtype=np.float64) for x in (compute, losses))
    if C.ndim != 1 or C.shape != L.shape or len(np.unique(C)) < 4:
        raise ValueError(
            f"fit_losses: found compute {list(C.shape)} and losses {list(L.shape)}, expected "
            "pairs at four or more different computes"
        )
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (C, L)):
        raise ValueError("fit_losses: compute and losses must be finite and above 0")
    scale = float(np.exp(np.log(C).mean()))
    u = np.log(C / scale)
    best, a, b, c = _search(u, L)
    flat = float(np.square(L - L.mean()).sum())
    if not (b > 0 and best < flat) or c < C_MIN * 1.01 or c > C_MAX * 0.99:
        raise ValueError(
            f"fit_losses: no law a + b·C^(−c) fits: the best has b {b:.3g}, c {c:.3g}; the losses "
            "must fall with compute"
        )
    rms = math.sqrt(best / len(L))
    return LossLaw(a, b * scale**c, c, float(C.min()), float(C.max()), rms)


C_MIN, C_MAX = 1e-3, 10.0


def _search(u: Array, L: Array) -> tuple[float, float, float, float]:
    """(squared error, a, b, c) of the best law in C/scale, u = ln(C/scale)."""
    try:
        from scipy.optimize import minimize_scalar, nnls
    except ImportError:
        raise ImportError("fit_losses needs SciPy: pip install 'saert[measure]'") from None

    def linear(log_c: float) -> tuple[float, Any]:
        columns = np.stack([np.ones_like(u), np.exp(-math.exp(log_c) * u)], 1)
        size = np.linalg.norm(columns, axis=0)
        found, residual = nnls(columns / size, L)
        return float(residual**2), found / size

    grid = np.linspace(math.log(C_MIN), math.log(C_MAX), 200)
    i = int(np.argmin([linear(x)[0] for x in grid]))
    around = (float(grid[max(i - 1, 0)]), float(grid[min(i + 1, len(grid) - 1)]))
    log_c = float(
        minimize_scalar(
            lambda x: linear(x)[0], bounds=around, method="bounded", options={"xatol": 1e-10}
        ).x
    )
    error, (a, b) = linear(log_c)
    return error, float(a), float(b), math.exp(log_c)
