"""How N2G predictions compare with the true activations, streamed over text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saert.measure.n2g.examples import active
from saert.measure.n2g.graph import Graph, Matcher
from saert.measure.passes import Encoded


@dataclass(frozen=True)
class Scores:
    """Per graph, [graphs]: predictions, how many are right, and Pearson's correlation."""

    predicted: Tensor  # int64
    correct: Tensor  # int64
    correlation: Tensor  # float64


def score(
    graphs: Sequence[Graph],
    latents: Sequence[int],
    batches: Iterable[Encoded],
    built_from: Sequence[Sequence[int]],
    first: int = 0,
) -> Scores:
    """Compare the graphs of `latents` with the codes of `batches`, at the tokens that are used.

    Args:
        built_from: for each graph, tokens that do not count because it was built from them;
            tokens count through the flattened rows of all batches.
        first: the column at which sequences start.
    """
    matcher, size = Matcher(graphs), len(graphs)
    slot = torch.full((int(max(latents, default=0)) + 1,), -1)
    slot[torch.tensor(latents, dtype=torch.int64)] = torch.arange(size)
    pairs = [(i, token) for i, tokens in enumerate(built_from) for token in tokens]
    known = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    counts = torch.zeros(3, size, dtype=torch.int64)  # tokens, predicted, correct
    sums = torch.zeros(5, size, dtype=torch.float64)  # p, t, p², t², p·t
    before = 0
    for seen in batches:
        total = seen.rows.numel()
        used = seen.used.flatten().cpu()
        here = (known[:, 1] >= before) & (known[:, 1] < before + total)
        left_out = known[here, 0] * total + known[here, 1] - before
        counts[0] += int(used.sum()) - torch.bincount(known[here, 0], minlength=size)

        matches = matcher(seen.rows, first)
        kept = used[matches.tokens]
        key = matches.graphs[kept] * total + matches.tokens[kept]
        predicted = _Entries(key, matches.values[kept]).without(left_out)

        latent, token, value = active(seen)
        graph = torch.where(latent < len(slot), slot[latent.clamp(max=len(slot) - 1)], -1)
        true = _Entries((graph * total + token)[graph >= 0], value[graph >= 0]).without(left_out)

        both, here_p, here_t = predicted.shared(true)
        counts[1] += predicted.count(total, size)
        counts[2] += torch.bincount(both // total, minlength=size)
        for row, keys, weights in (
            (0, predicted.key, predicted.value),
            (1, true.key, true.value),
            (2, predicted.key, predicted.value**2),
            (3, true.key, true.value**2),
            (4, both, here_p * here_t),
        ):
            sums[row] += torch.bincount(keys // total, weights, minlength=size)
        before += total
    n = counts[0].double()
    p, t, pp, tt, pt = sums
    spread = ((n * pp - p * p) * (n * tt - t * t)).clamp(min=0).sqrt()
    correlation = torch.where(spread > 0, (n * pt - p * t) / spread, torch.nan)
    return Scores(counts[1], counts[2], correlation.clamp(-1, 1))


@dataclass(frozen=True)
class _Entries:
    """Nonzero activations by key = graph · tokens + token, each key once."""

    key: Tensor
    value: Tensor

    def without(self, keys: Tensor) -> _Entries:
        kept = ~torch.isin(self.key, keys)
        order = self.key[kept].argsort()
        return _Entries(self.key[kept][order], self.value[kept][order])

    def count(self, total: int, size: int) -> Tensor:
        return torch.bincount(self.key // total, minlength=size)

    def shared(self, other: _Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Keys in both, with the two values of each."""
        mine, theirs = torch.isin(self.key, other.key), torch.isin(other.key, self.key)
        return self.key[mine], self.value[mine], other.value[theirs]
