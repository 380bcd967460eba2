"""Fitting a reducible plus an irreducible term, each the exponential of a linear form.

Numbers only: `scaling` says what they mean. Nonlinear least squares on logarithms from several
starts, intervals by a bootstrap of the residuals, and what the data cannot tell.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Below this share of the prediction, a coefficient moves no loss that anyone could measure.
NO_LEVERAGE = 1e-3
# Beyond this, the least certain direction is 10⁶ times less certain than the best known one.
ILL_CONDITIONED = 1e6
# An interval that spans more than this factor of the loss term it belongs to says nothing.
TOO_WIDE = math.log(10)
OPEN = "the 95% interval leaves its term open by more than a factor of ten"
# Pulls θ towards 0, so that a term the data do not need cannot run to infinity: worth a residual of
# 0.001% per unit of θ, far below any noise in a loss.
LEASH = 1e-5
HUBER = 1.345  # in standard deviations: 95% efficient where the residuals are in fact normal
MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation


class Problem(NamedTuple):
    """ln L = ln(exp(reducible · θ_r) + exp(irreducible · θ_i)), θ = (θ_r, θ_i).

    The features are centred: at the origin of ln n, far from any data, all coefficients look alike.

    Attributes:
        reducible: [points, r], a column of ones, then the features; those that `irreducible` has
            too come first, and the next one is the logarithm of what the loss should fall with.
        irreducible: [points, i], a column of ones, then features.
        log_loss: [points].
        uncentre: [r + i, r + i], the reported coefficients from θ (E and A as logarithms).
        ranges: [r + i], how much each feature varies; 1 for the columns of ones.
        falls_with: what the loss should fall with, in words.
    """

    reducible: Array
    irreducible: Array
    log_loss: Array
    uncentre: Array
    ranges: Array
    falls_with: str

    @property
    def features(self) -> Array:
        """[points, r + i]: the columns that θ multiplies."""
        return np.concatenate([self.reducible, self.irreducible], 1)

    def terms(self, theta: Array) -> tuple[Array, Array]:
        """[points] each: the logarithms of both terms."""
        r = self.reducible.shape[1]
        return self.reducible @ theta[:r], self.irreducible @ theta[r:]

    def log_prediction(self, theta: Array) -> Array:
        return np.asarray(np.logaddexp(*self.terms(theta)))

    def jacobian(self, theta: Array) -> Array:
        """[points, r + i]: of the log prediction; a feature counts by its term's share."""
        total = self.log_prediction(theta)
        shares = [np.exp(term - total) for term in self.terms(theta)]
        return (
            np.repeat(
                np.stack(shares, 1), [self.reducible.shape[1], self.irreducible.shape[1]], axis=1
            )
            * self.features
        )

    def starts(self) -> list[Array]:
        """Deterministic starting points: what if the floor is this share of the least loss?

        Given a floor, both terms are linear in logarithms. Where the floor may depend on k it takes
        one share at the least k and another at the largest.
        """
        found = []
        shares = (0.05, 0.4, 0.7, 0.95)
        slope = self.irreducible[:, -1]
        tilt = (slope - slope.min()) / (np.ptp(slope) or 1.0)
        groups = np.unique(self.irreducible, axis=0, return_inverse=True)[1].reshape(-1)
        least = np.array([self.log_loss[groups == g].min() for g in groups])
        for low in shares:
            for high in shares if np.ptp(slope) else (low,):
                floor = least + (1 - tilt) * math.log(low) + tilt * math.log(high)
                rest = np.log(np.exp(self.log_loss) - np.exp(floor))
                theta_r = np.linalg.lstsq(self.reducible, rest, rcond=None)[0]
                theta_i = np.linalg.lstsq(self.irreducible, floor, rcond=None)[0]
                found.append(np.concatenate([theta_r, theta_i]))
        return found


def solve(problem: Problem, robust: bool, draws: int, seed: int, block: int) -> tuple[Array, Array]:
    """The best θ over all starts, and [draws, θ] refits to predictions plus resampled residuals."""
    y = problem.log_loss
    fits = [least_squares(problem, y, start) for start in problem.starts()]
    theta = min(fits, key=lambda t: float(np.square(problem.log_prediction(t) - y).sum()))
    theta = least_squares(problem, y, theta, ftol=1e-14)
    scale = math.inf
    if robust:
        for _ in range(3):  # the scale of the residuals, and the fit that ignores what exceeds it
            scale = HUBER * spread(problem.log_prediction(theta) - y)
            theta = least_squares(problem, y, theta, scale)
    centre = problem.log_prediction(theta)
    # A fit's residuals are smaller than the errors that made them, and so few say little about
    # their scale: Student's factor over the normal one widens the intervals accordingly.
    freedom = len(y) - len(theta)
    student = float(_scipy("stats").t.ppf(0.975, freedom)) / 1.96
    residuals = (y - centre) * math.sqrt(len(y) / freedom) * student
    random = np.random.default_rng(seed)
    replicas = np.empty((draws, len(theta)))
    for i in range(draws):
        first = random.integers(len(y), size=-(-len(y) // block))
        rows = (first[:, None] + np.arange(block)).reshape(-1)[: len(y)] % len(y)
        # An interval does not need the tolerance of an estimate.
        replicas[i] = least_squares(problem, centre + residuals[rows], theta, scale, ftol=1e-6)
    return theta, replicas


def least_squares(
    problem: Problem, y: Array, start: Array, scale: float = math.inf, ftol: float = 1e-8
) -> Array:
    """θ of least Σ r² over log residuals r, from `start`; linear beyond |r| = `scale` (Huber)."""
    pull = LEASH * np.eye(len(start))

    # Huber's loss as a square, so that MINPACK, which knows squares alone, can take it:
    # beyond the scale, s² = 2·scale·|r| − scale².
    def residuals(theta: Array) -> Array:
        r = problem.log_prediction(theta) - y
        far = np.abs(r) > scale
        r[far] = np.sign(r[far]) * np.sqrt(2 * scale * np.abs(r[far]) - scale**2)
        return np.concatenate([r, pull @ theta])

    def jacobian(theta: Array) -> Array:
        J = problem.jacobian(theta)
        if scale < math.inf:
            J *= (scale / np.maximum(np.abs(residuals(theta)[: len(J)]), scale))[:, None]
        return np.concatenate([J, pull])

    solution = _scipy("optimize").least_squares(
        residuals, start, jac=jacobian, method="lm", ftol=ftol, max_nfev=200
    )
    return np.asarray(solution.x)


def _scipy(module: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError(
            "fitting scaling laws needs scipy, which is not installed: pip install 'saert[train]'"
        ) from error


def spread(residuals: Array) -> float:
    """Their standard deviation were they normal, whatever the outliers do; never 0."""
    return max(MAD * float(np.median(np.abs(residuals))), 1e-8)


def standard_errors(
    problem: Problem, theta: Array, residuals: Array, robust: bool
) -> tuple[float, Array]:
    """The condition number of the Jacobian, and [coefficients] errors of what is reported."""
    J = problem.jacobian(theta)
    norms = np.linalg.norm(J, axis=0)
    if not norms.all():
        return math.inf, np.full(len(theta), math.nan)
    condition = float(np.linalg.cond(J / norms))
    if not condition < ILL_CONDITIONED:
        return condition, np.full(len(theta), math.nan)
    freedom = len(residuals) - len(theta)
    variance = float(np.square(residuals).sum()) / freedom
    if robust:
        variance = spread(residuals) ** 2 * len(residuals) / freedom
    half = problem.uncentre @ np.linalg.pinv(J)
    return condition, np.sqrt(variance * np.square(half).sum(1))


def unidentified(
    problem: Problem, theta: Array, replicas: Array, condition: float
) -> list[str | None]:
    """Why the data do not tell each of θ, None where they do."""
    shared = problem.irreducible.shape[1]
    low, high = np.quantile(replicas, [0.025, 0.975], axis=0)
    if high[shared] * problem.ranges[shared] > -NO_LEVERAGE:
        return [
            f"the loss does not fall with {problem.falls_with} beyond its noise, so the reducible "
            "and the irreducible term cannot be told apart"
        ] * len(theta)
    J = problem.jacobian(theta)
    norms = np.linalg.norm(J, axis=0)
    _, singular, directions = np.linalg.svd(J / np.where(norms > 0, norms, 1.0))
    flat = np.abs(directions[singular < singular[0] / ILL_CONDITIONED]) > 0.1
    reasons: list[str | None] = []
    for i in range(len(theta)):
        why = None
        if norms[i] < NO_LEVERAGE * math.sqrt(len(J)):
            why = f"no loss moves with it by more than {NO_LEVERAGE:.1%}; vary k or num_latents"
        elif flat[:, i].any():
            why = f"others can take its place (condition number {condition:.1e})"
        elif (high[i] - low[i]) * problem.ranges[i] > TOO_WIDE:
            why = OPEN
        reasons.append(why)
    return reasons
