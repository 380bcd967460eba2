"""What one latent looks like: where it fires, how strongly, what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saert.measure.features.store import Entries


@dataclass(frozen=True)
class Selection:
    """Which examples a card shows.

    Attributes:
        top: rows with the largest activations.
        quantiles: bands of equal width from 0 to the largest activation, as SAEDashboard's.
        per_quantile: examples drawn from each band.
        before, after: tokens shown on either side of an example's peak.
        bins: bars of the histogram.
        seed: of the draws; each latent has draws of its own.
    """

    top: int = 20
    quantiles: int = 5
    per_quantile: int = 5
    before: int = 24
    after: int = 8
    bins: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A stretch of one row around a token at which the latent fires.

    Attributes:
        row, first: where it was cut from: row of the index, and position of its first token.
        peak: which of its tokens it was chosen for.
        tokens, activations: token ids, and the latent's activation at each.
        strings: the tokens as text; empty if the index was made without a tokenizer.
    """

    row: int
    first: int
    peak: int
    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    strings: tuple[str, ...]


@dataclass(frozen=True)
class Band:
    """Activations in (low, high]: how many, and examples drawn from them."""

    low: float
    high: float
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Logit:
    """A token and what the latent's direction adds to its logit, up to a common positive scale."""

    token: int
    string: str
    value: float


@dataclass(frozen=True)
class Card:
    """All that an index knows of one latent.

    Attributes:
        label: what it stands for, if somebody said so.
        count: tokens at which it fires; density: as a part of all tokens looked at.
        mean: of the activations where it fires; largest: the largest of them. 0 if it is dead.
        moments: E[a], E[a²], E[a³], E[a⁴] over all tokens looked at.
        heights: int64 [bins], a histogram of the activations from 0 to `largest`.
        top: one example a row, the strongest first; of equal stretches of text only one.
        bands: examples by activation, the strongest band first; their rows differ.
        promoted, suppressed: the logit lens; empty where it is not defined.
        neighbours: (latent, cosine) of the nearest decoder directions.
        logit_heights, logit_span: histogram of the lens logits of all tokens, and its ends.
    """

    latent: int
    label: str | None
    count: int
    density: float
    mean: float
    largest: float
    moments: tuple[float, float, float, float]
    heights: NDArray[np.int64]
    top: tuple[Example, ...]
    bands: tuple[Band, ...]
    promoted: tuple[Logit, ...]
    suppressed: tuple[Logit, ...]
    neighbours: tuple[tuple[int, float], ...]
    logit_heights: NDArray[np.int32]
    logit_span: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data, for JSON."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Example | Band | Logit):
        return {name: _plain(inner) for name, inner in vars(value).items()}
    return value


class Examples:
    """Cuts stretches of text out of the rows that one latent fires in.

    `tokens` [rows, context]; `used` gives a row's bool [context]; `strings` names token ids.
    """

    def __init__(
        self,
        entries: Entries,
        tokens: NDArray[Any],
        used: Callable[[int], NDArray[np.bool_]],
        strings: Callable[[list[int]], tuple[str, ...]],
        selection: Selection,
    ) -> None:
        self.rows, self.positions, self.values = entries
        self.tokens, self.used, self.strings = tokens, used, strings
        self.selection = selection

    def at(self, entry: int) -> Example:
        """The stretch around one entry. Tokens that were left out are cut off its ends."""
        row, peak = int(self.rows[entry]), int(self.positions[entry])
        used = self.used(row)
        first = max(0, peak - self.selection.before)
        last = min(len(used), peak + self.selection.after + 1)
        looked_at = np.flatnonzero(used[first:last])
        first, last = first + int(looked_at[0]), first + int(looked_at[-1]) + 1
        begin, end = np.searchsorted(self.rows, [row, row + 1])
        values = np.zeros(len(used), np.float64)
        values[self.positions[begin:end]] = self.values[begin:end]
        ids = self.tokens[row, first:last].tolist()
        return Example(
            row, first, peak - first, tuple(ids), tuple(values[first:last].tolist()),
            self.strings(ids),
        )  # fmt: skip

    def top(self) -> tuple[Example, ...]:
        """The rows with the largest activations, each at its largest."""
        if not len(self.rows):
            return ()
        starts = np.flatnonzero(np.diff(self.rows, prepend=-1))
        largest = np.maximum.reduceat(self.values, starts)
        found: dict[tuple[int, ...], Example] = {}
        for i in np.argsort(-largest, kind="stable"):
            if len(found) == self.selection.top:
                break
            end = starts[i + 1] if i + 1 < len(starts) else len(self.rows)
            one = self.at(int(starts[i] + np.argmax(self.values[starts[i] : end])))
            found.setdefault(one.tokens, one)
        return tuple(found.values())

    def bands(self, latent: int) -> tuple[Band, ...]:
        """Draws from bands of equal width, the strongest first; no row is drawn from twice."""
        if not len(self.rows):
            return ()
        rng = np.random.default_rng([self.selection.seed, latent])
        edges = np.linspace(0, float(self.values.max()), self.selection.quantiles + 1)
        of = np.searchsorted(edges[1:-1], self.values)  # (low, high]
        taken: set[int] = set()
        found = []
        for band in reversed(range(self.selection.quantiles)):
            inside = np.flatnonzero(of == band)
            drawn: list[int] = []
            for entry in rng.permutation(inside).tolist():
                if len(drawn) == self.selection.per_quantile:
                    break
                if int(self.rows[entry]) not in taken:
                    taken.add(int(self.rows[entry]))
                    drawn.append(entry)
            examples = tuple(self.at(entry) for entry in drawn)
            found.append(Band(float(edges[band]), float(edges[band + 1]), len(inside), examples))
        return tuple(found)
