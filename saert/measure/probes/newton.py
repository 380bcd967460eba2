"""A logistic probe on every latent at once: Newton-Raphson on sparse codes.

For each latent i, over examples n with labels y and (pooled) activations z,

    min over w, b of   mean_n BCE(y, σ(w·z_in + b)) + λ/2 · w² · mean_n z_in²

The ridge keeps separable latents finite. It weighs the mean square of what the latent adds to the
logit, so the answer depends neither on a latent's units nor on how rare it is; scikit-learn's
`LogisticRegression(C=1/(λN))` on z/√mean z² minimises the same sum.

Only the examples on which a latent fires are visited. All others have z = 0 and the logit b, and
enter loss, gradient and Hessian in closed form. Source of the score: Gao et al. 2024, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from saert.sparse import SparseCode

ARMIJO = 1e-4
"""The share of the promised decrease that a step must bring (Nocedal and Wright, section 3.1)."""
ROUNDING = 1e-13
"""Relative error of a loss in float64: smaller differences say nothing about a step."""


@dataclass(frozen=True)
class Columns:
    """The codes of examples, latent by latent: what fires where.

    Attributes:
        examples, num_latents: the shape [examples, num_latents] of the matrix.
        offsets: int64 [num_latents + 1]; the entries of latent i are offsets[i]:offsets[i + 1].
        rows: int64 [entries], the example of each, ascending within a latent.
        values: floating [entries], its activation, never 0.
    """

    examples: int
    num_latents: int
    offsets: Tensor
    rows: Tensor
    values: Tensor

    @classmethod
    def from_entries(
        cls, rows: Tensor, latents: Tensor, values: Tensor, examples: int, num_latents: int
    ) -> Columns:
        """From (example, latent, activation) triples in any order, each pair at most once."""
        used = values != 0
        rows, latents, values = rows[used], latents[used], values[used]
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise ValueError(f"probe: {bad} of {len(values)} activations are NaN or inf")
        order = (latents * examples + rows).argsort()
        counts = torch.bincount(latents, minlength=num_latents)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        return cls(examples, num_latents, offsets, rows[order], values[order])

    @classmethod
    def from_code(cls, code: SparseCode) -> Columns:
        """From a code [examples, k]; ValueError if an example names a latent twice."""
        if code.indices.dim() != 2:
            raise ValueError(
                f"probe: the code is {list(code.shape)}, expected [examples, k]: pool the tokens "
                "of an example first, or flatten them"
            )
        rows = torch.arange(len(code.indices), device=code.indices.device)
        rows = rows[:, None].expand_as(code.indices).flatten()
        found = cls.from_entries(
            rows, code.indices.flatten(), code.values.flatten(), len(code.indices), code.num_latents
        )
        pair = found.latents() * found.examples + found.rows
        if (pair[1:] == pair[:-1]).any():
            raise ValueError("probe: an example of the code names a latent twice")
        return found

    def latents(self) -> Tensor:
        """The latent of each entry: int64 [entries]."""
        every = torch.arange(self.num_latents, device=self.offsets.device)
        found: Tensor = every.repeat_interleave(self.offsets.diff())
        return found

    def select(self, examples: Tensor) -> Columns:
        """The examples where `examples` (bool [examples]) is true, numbered anew."""
        kept = examples[self.rows]
        number = examples.cumsum(0) - 1
        return Columns.from_entries(
            number[self.rows[kept]], self.latents()[kept], self.values[kept],
            int(examples.sum()), self.num_latents,
        )  # fmt: skip

    def dense(self, latents: Sequence[int]) -> Tensor:
        """Activations of E latents: float64 [examples, E]."""
        found = self.values.new_zeros(self.examples, len(latents), dtype=torch.float64)
        for at, latent in enumerate(latents):
            entries = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
            found[self.rows[entries], at] = self.values[entries].double()
        return found


@dataclass(frozen=True)
class LatentFits:
    """The probe of every latent: float64 [num_latents] each, `converged` bool.

    Attributes:
        weights, biases: w and b, in units of the activations.
        losses: mean binary cross-entropy in nats, without the ridge.
        converged: whether the last Newton step was below the tolerance.

    A latent that fires on no example has weight 0 and the loss of the base rate.
    """

    weights: Tensor
    biases: Tensor
    losses: Tensor
    converged: Tensor

    @property
    def best(self) -> int:
        """The latent with the lowest loss, the lowest of equals."""
        return int((self.losses == self.losses.min()).nonzero()[0])


def fit_latents(
    columns: Columns,
    labels: Tensor,
    *,
    ridge: float = 1e-6,
    tolerance: float = 1e-8,
    max_steps: int = 100,
    block: int = 1 << 19,
) -> LatentFits:
    """One logistic probe for every latent.

    Args:
        columns: activations of N examples.
        labels: bool [N].
        ridge: λ of the module's formula; above 0.
        tolerance: a latent is done when a full Newton step moves b, and w times the latent's root
            mean square where it fires, by less than this in sum (of the logit, so unitless).
        max_steps: evaluations at most; what is not done by then is marked so.
        block: entries in memory at once, in float64.

    Raises ValueError for labels of another length or of one class only.
    """
    y = _checked(labels, columns).to(columns.values.device).double()
    if not ridge > 0:
        raise ValueError(f"probe: ridge is {ridge}, expected above 0: separable latents diverge")
    base = y.mean()
    prior = torch.logit(base)
    found = LatentFits(
        torch.zeros(columns.num_latents, dtype=torch.float64, device=y.device),
        prior.repeat(columns.num_latents),
        (F.softplus(prior) - base * prior).repeat(columns.num_latents),
        torch.ones(columns.num_latents, dtype=torch.bool, device=y.device),
    )
    counts = columns.offsets.diff()
    active = counts.nonzero().flatten()
    part = torch.div(columns.offsets[active], block, rounding_mode="floor")
    for latents in active.split(torch.unique_consecutive(part, return_counts=True)[1].tolist()):
        entries = slice(int(columns.offsets[latents[0]]), int(columns.offsets[latents[-1] + 1]))
        problem = _Problem.of(
            columns.values[entries].double(), y[columns.rows[entries]], counts[latents], y, ridge
        )
        w, b, losses, done = _newton(problem, prior, tolerance, max_steps)
        found.weights[latents] = w / problem.scale
        found.biases[latents], found.losses[latents], found.converged[latents] = b, losses, done
    return found


@dataclass(frozen=True)
class _Problem:
    """Some latents: their entries, in units of the root mean square where each fires, and how many
    silent examples (and positives among them) each has. [latents] or [entries], float64."""

    z: Tensor
    y: Tensor
    counts: Tensor
    scale: Tensor
    silent: Tensor
    silent_positive: Tensor
    examples: int
    ridge: float

    @classmethod
    def of(cls, z: Tensor, y: Tensor, counts: Tensor, every: Tensor, ridge: float) -> _Problem:
        scale = (_sums(z.square(), counts) / counts).sqrt()
        return cls(
            z / scale.repeat_interleave(counts), y, counts, scale,
            silent=len(every) - counts.double(),
            silent_positive=every.sum() - _sums(y, counts),
            examples=len(every), ridge=ridge,
        )  # fmt: skip

    def keep(self, latents: Tensor) -> _Problem:
        entries = latents.repeat_interleave(self.counts)
        return _Problem(
            self.z[entries], self.y[entries], self.counts[latents], self.scale[latents],
            self.silent[latents], self.silent_positive[latents], self.examples, self.ridge,
        )  # fmt: skip

    def at(self, w: Tensor, b: Tensor) -> Tensor:
        """Loss without the ridge, objective, gradient (b, w) and Hessian (bb, bw, ww): [7, n]."""
        logit = self.z * w.repeat_interleave(self.counts) + b.repeat_interleave(self.counts)
        # No 1 - σ and no softplus(l) - l: they lose all digits where a latent separates.
        sign = 1 - 2 * self.y
        slope = sign * (sign * logit).sigmoid()
        bend = logit.sigmoid() * (-logit).sigmoid()
        bend_z = bend * self.z
        loss, gb, gw, bb, bw, ww = (
            _sums(t, self.counts)
            for t in (-F.logsigmoid(-sign * logit), slope, slope * self.z,
                      bend, bend_z, bend_z * self.z)
        )  # fmt: skip
        yes, no = b.sigmoid(), (-b).sigmoid()  # of every silent example
        positive, negative = self.silent_positive, self.silent - self.silent_positive
        loss = (loss - negative * F.logsigmoid(-b) - positive * F.logsigmoid(b)) / self.examples
        gb = (gb + negative * yes - positive * no) / self.examples
        bb = (bb + self.silent * yes * no) / self.examples
        weight = self.ridge * self.counts / self.examples
        return torch.stack((
            loss, loss + weight / 2 * w.square(), gb, gw / self.examples + weight * w,
            bb, bw / self.examples, ww / self.examples + weight,
        ))  # fmt: skip


def _newton(
    problem: _Problem, prior: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (in units of `scale`), biases, losses and convergence: Newton with backtracking.

    Every latent has its own step length: 1, halved until the objective falls by enough.
    """
    n = len(problem.counts)
    w, b = torch.zeros_like(problem.scale), prior.repeat(n)
    state = problem.at(w, b)
    step = _direction(state)
    length = torch.ones_like(w)
    done = torch.zeros(n, dtype=torch.bool, device=w.device)
    where = torch.arange(n, device=w.device)  # the latents that `problem` still holds
    for _ in range(max_steps):
        trial_b, trial_w = b[where] + length * step[0], w[where] + length * step[1]
        trial = problem.at(trial_w, trial_b)
        before, promised = state[1, where], (state[2:4, where] * step).sum(0)
        slack = ROUNDING * before.abs()
        good = trial[1] <= before + ARMIJO * length * promised + slack
        taken = where[good]
        b[taken], w[taken], state[:, taken] = trial_b[good], trial_w[good], trial[:, good]
        small = step.abs().sum(0) <= tolerance
        done[where] = good & (length == 1) & small
        length = torch.where(good, torch.ones_like(length), length / 2)
        step = torch.where(good, _direction(state[:, where]), step)
        left = ~done[where]
        if not left.any():
            break
        if 2 * int(left.sum()) < len(where):  # go on with the stragglers alone
            problem = problem.keep(left)
            where, step, length = where[left], step[:, left], length[left]
    return w, b, state[0], done


def _direction(state: Tensor) -> Tensor:
    """The Newton step (b, w) of each latent: [2, n]. The ridge makes every Hessian definite."""
    _, _, gb, gw, bb, bw, ww = state
    determinant = bb * ww - bw.square()
    step: Tensor = torch.stack((bw * gw - ww * gb, bw * gb - bb * gw)) / determinant
    return step


def _sums(entries: Tensor, counts: Tensor) -> Tensor:
    """Sums over the entries of each latent."""
    found: Tensor = torch.segment_reduce(entries, "sum", lengths=counts, unsafe=True)
    return found


def _checked(labels: Tensor, columns: Columns) -> Tensor:
    if labels.dtype != torch.bool or labels.shape != (columns.examples,):
        raise ValueError(
            f"probe: labels are {labels.dtype} {list(labels.shape)}, expected torch.bool "
            f"[{columns.examples}], one for each example"
        )
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise ValueError(
            f"probe: {positives} of {len(labels)} examples are positive; both classes are needed"
        )
    return labels
