"""N2G graphs: which tokens, read backwards from a position, a latent answers to.

A graph is a trie over reversed patterns (Foote et al. 2023; Gao et al. 2024, section 4.4; OpenAI's
`sparse_autoencoder/explanations.py`). Prediction is one greedy walk back from each position: an
exact token is preferred over a wildcard, the first leaf ends the walk, and nothing is tried twice.
A graph for "a, anything, c" and "a, c" therefore misses `a b b c`: the walk has one wildcard only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

ANY, START = -1, -2
"""Keys of a path that are no token: any token at all, and the start of the sequence."""

Show = Callable[[int], str]


@dataclass(frozen=True)
class Pattern:
    """Consecutive tokens at which a latent fires, and how strongly.

    Attributes:
        tokens: token ids in reading order, `ANY` where any token will do.
        at_start: whether the first of them has to be the first of the sequence.
        value: the activation at the last token.
    """

    tokens: tuple[int, ...]
    at_start: bool
    value: float

    @property
    def path(self) -> tuple[int, ...]:
        """The way from the root to the leaf: the tokens backwards, then START if it matters."""
        return (*reversed(self.tokens), *((START,) if self.at_start else ()))


class Graph:
    """What N2G says about one latent: patterns, and predictions from them.

    Of equal patterns the last one counts. A pattern that no walk can reach, because a shorter one
    ends on its way, is left out.

    >>> graph = Graph([Pattern((5, ANY, 7), False, 2.0)])
    >>> graph.predict([5, 6, 7, 7])
    [0.0, 0.0, 2.0, 0.0]
    """

    def __init__(self, patterns: Iterable[Pattern] = ()) -> None:
        last = {pattern.path: pattern for pattern in patterns}
        if () in last:
            raise ValueError("Graph: found a pattern without tokens")
        self.patterns = tuple(
            pattern
            for path, pattern in last.items()
            if not any(path[:i] in last for i in range(1, len(path)))
        )

    @property
    def wild(self) -> bool:
        """Whether a pattern is wildcards only, so that nearly every token is predicted. It comes of
        an activation that is still there with the padding token in every place."""
        return any(set(one.tokens) == {ANY} and not one.at_start for one in self.patterns)

    @cached_property
    def _trie(self) -> dict[int, Any]:
        root: dict[int, Any] = {}
        for pattern in self.patterns:
            *way, end = pattern.path
            node = root
            for key in way:
                node = node.setdefault(key, {})
            node[end] = pattern.value
        return root

    def value(self, tokens: Sequence[int]) -> float:
        """The predicted activation at the last of `tokens`, the first of which starts a sequence;
        0 where no pattern matches."""
        node: Any = self._trie
        for token in reversed(tokens):
            node = node.get(token, node.get(ANY))
            if node is None:
                return 0.0
            if isinstance(node, float):
                return node
        return float(node.get(START, 0.0))

    def predict(self, tokens: Sequence[int]) -> list[float]:
        """The predicted activation at every token of a sequence. One walk at a time: `Matcher` is
        the fast way."""
        return [self.value(tokens[: i + 1]) for i in range(len(tokens))]

    def lines(self, show: Show = str) -> list[str]:
        """Patterns to read, strongest first: `[START] the|a * dog  3.1`.

        Patterns that differ in one token are one line, `|` between the tokens and the smallest and
        largest activation behind it. `show`: a token id -> text.
        """
        rows = sorted(_merged(self.patterns), key=lambda row: -row.high)
        return [row.text(show) for row in rows]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and set(self.patterns) == set(other.patterns)

    def __hash__(self) -> int:
        return hash(frozenset(self.patterns))

    def __repr__(self) -> str:
        return f"Graph({'; '.join(self.lines()) or 'empty'})"


class _Row(NamedTuple):
    slots: tuple[tuple[int, ...], ...]  # the tokens that each place allows
    at_start: bool
    low: float
    high: float

    def text(self, show: Show) -> str:
        words = ["|".join("*" if t == ANY else show(t) for t in slot) for slot in self.slots]
        low, high = f"{self.low:.2f}", f"{self.high:.2f}"
        strength = low if low == high else f"{low}–{high}"
        return " ".join([*(["[START]"] if self.at_start else []), *words]) + f"  {strength}"


def _merged(patterns: Sequence[Pattern]) -> list[_Row]:
    rows = [_Row(tuple((t,) for t in p.tokens), p.at_start, p.value, p.value) for p in patterns]
    for place in range(max((len(row.slots) for row in rows), default=0)):
        alike: dict[Any, _Row] = {}
        for row in rows:
            slots = row.slots
            if place >= len(slots) or slots[place] == (ANY,):
                alike[row] = row
                continue
            key = (slots[:place], slots[place + 1 :], row.at_start)
            if key in alike:
                one = alike[key]
                both = (*slots[:place], one.slots[place] + slots[place], *slots[place + 1 :])
                row = _Row(both, row.at_start, min(one.low, row.low), max(one.high, row.high))
            alike[key] = row
        rows = list(alike.values())
    return rows


class Matches(NamedTuple):
    """Predictions that are not zero, one entry each.

    Attributes:
        tokens: int64, the position in the flattened rows.
        graphs: int64, which of the graphs.
        values: float64, the predicted activation.
    """

    tokens: Tensor
    graphs: Tensor
    values: Tensor


class Matcher:
    """Many graphs in one table, walked from all positions of a batch of rows at once."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        edges: dict[tuple[int, int], int] = {}
        values = [torch.nan] * len(graphs)  # of nodes; node i is the root of graph i
        for root, graph in enumerate(graphs):
            for pattern in graph.patterns:
                node = root
                for key in pattern.path:
                    if (node, key) not in edges:
                        edges[node, key] = len(values)
                        values.append(torch.nan)
                    node = edges[node, key]
                values[node] = pattern.value
        self.num_graphs = len(graphs)
        # START, ANY and the tokens are keys 0, 1, 2 and up; the last stands for every other token
        self._keys = max((token for _, token in edges), default=0) + 4
        pairs = sorted((node * self._keys + key + 2, child) for (node, key), child in edges.items())
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        self._edges, self._children = table[:, 0].contiguous(), table[:, 1].contiguous()
        self._values = torch.tensor(values, dtype=torch.float64)
        nodes, keys = self._edges // self._keys, self._edges % self._keys
        roots = nodes < self.num_graphs
        self._root_keys, order = keys[roots].sort(stable=True)
        self._roots = nodes[roots][order]

    def __call__(self, rows: Tensor, first: int = 0) -> Matches:
        """rows int64 [rows, context] -> predictions. A sequence starts at column `first`; the
        columns before it are not looked at."""
        batch, context = rows.shape
        keys = (rows.cpu().flatten() + 2).clamp(max=self._keys - 1)
        column = torch.arange(context).repeat(batch)
        here = (column >= first).nonzero().flatten()
        found: list[Matches] = []
        at, graph, node = self._begin(here, keys)
        back = torch.ones_like(at)  # tokens consumed
        while len(at):
            value = self._values[node]
            leaf = ~value.isnan()
            found.append(Matches(at[leaf], graph[leaf], value[leaf]))
            at, graph, node, back = at[~leaf], graph[~leaf], node[~leaf], back[~leaf]
            inside = column[at] - back >= first
            key = torch.where(inside, keys[at - back * inside], 0)
            node = self._step(node, key, inside)
            kept = node >= 0
            at, graph, node, back = at[kept], graph[kept], node[kept], back[kept] + 1
        if not found:
            return Matches(here[:0], here[:0], self._values[:0])
        return Matches(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _begin(self, here: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, graphs and nodes after the first step, of the walks that survive it."""
        low = torch.searchsorted(self._root_keys, keys[here])
        many = torch.searchsorted(self._root_keys, keys[here], right=True) - low
        at = here.repeat_interleave(many)
        nth = torch.arange(len(at)) - (many.cumsum(0) - many).repeat_interleave(many)
        graph = self._roots[low.repeat_interleave(many) + nth]
        # a wildcard at the root takes every position that has no exact edge
        wild = self._roots[self._root_keys == ANY + 2]
        any_at, any_graph = (t.flatten() for t in torch.meshgrid(here, wild, indexing="ij"))
        free = self._find(any_graph, keys[any_at]) < 0
        at, graph = torch.cat([at, any_at[free]]), torch.cat([graph, any_graph[free]])
        return at, graph, self._step(graph, keys[at], torch.ones_like(at, dtype=torch.bool))

    def _step(self, node: Tensor, key: Tensor, inside: Tensor) -> Tensor:
        exact = self._find(node, key)
        wild = self._find(node, torch.full_like(key, ANY + 2))
        return torch.where((exact < 0) & inside, wild, exact)

    def _find(self, node: Tensor, key: Tensor) -> Tensor:
        """The child at a key, or -1."""
        if not len(self._edges):
            return torch.full_like(node, -1)
        wanted = node * self._keys + key
        place = torch.searchsorted(self._edges, wanted).clamp(max=len(self._edges) - 1)
        return torch.where(self._edges[place] == wanted, self._children[place], -1)
