"""From sampled activations to graphs: what `explain` does with a few latents at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saert.hookpoint import unwrap
from saert.measure.n2g.build import Example, Probe, find_patterns
from saert.measure.n2g.examples import Sampler
from saert.measure.n2g.explanations import Explanation
from saert.measure.n2g.graph import Graph
from saert.measure.n2g.score import Scores
from saert.sae import SAE


@dataclass(frozen=True)
class Draft:
    """An explanation before its precision is known."""

    latent: int
    graph: Graph
    train: list[int]  # tokens, counted through the flattened rows
    heldout: list[int]
    recalled: int
    active: int
    tokens: int

    def explanation(self, scores: Scores, place: int) -> Explanation:
        """With its scores, which stand at `place`."""
        return Explanation(
            latent=self.latent,
            graph=self.graph,
            active=self.active,
            tokens=self.tokens,
            train=len(self.train),
            heldout=len(self.heldout),
            recalled=self.recalled,
            predicted=int(scores.predicted[place]),
            correct=int(scores.correct[place]),
            correlation=float(scores.correlation[place]),
        )


class Maker:
    """Graphs of a few latents at a time, from their samples."""

    def __init__(
        self,
        model: Any,
        sae: SAE,
        rows: Tensor,
        sampler: Sampler,
        sizes: tuple[int, int],
        pad: int,
        begin: int | None,
        batch: int,
    ) -> None:
        before = () if begin is None else (begin,)
        self.probe = Probe(model, sae, before, tokens=batch * rows.shape[1])
        self.rows, self.sampler, self.sizes, self.pad = rows, sampler, sizes, pad
        self.first = len(before)
        config: Any = getattr(unwrap(model)[1], "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        limit = getattr(config, "max_position_embeddings", None)
        self.longest = None if limit is None else limit - self.first

    def drafts(self, latents: Sequence[int]) -> list[Draft]:
        """Their graphs and recall; the altered texts of all of them share batches."""
        samples = [self._split_sample(latent) for latent in latents]
        examples = [
            Example(latent, self._text(token), value)
            for latent, (train, _, values) in zip(latents, samples, strict=True)
            for token, value in zip(train, values, strict=True)
        ]
        patterns = iter(find_patterns(self.probe, examples, self.pad, self.longest))
        drafts = []
        for latent, (train, heldout, _) in zip(latents, samples, strict=True):
            graph = Graph(next(patterns) for _ in train)
            recalled = sum(graph.value(self._text(token)) != 0 for token in heldout)
            counts = int(self.sampler.counts[latent]), self.sampler.tokens
            drafts.append(Draft(latent, graph, train, heldout, recalled, *counts))
        return drafts

    def _split_sample(self, latent: int) -> tuple[list[int], list[int], list[float]]:
        tokens, values = self.sampler.of(latent)
        train, heldout = self.sizes
        size = min(train, -(-len(tokens) * train // (train + heldout)))
        return tokens[:size], tokens[size : size + heldout], values[:size]

    def _text(self, token: int) -> tuple[int, ...]:
        """The tokens from the start of its sequence up to a token of the flattened rows."""
        row, column = divmod(token, self.rows.shape[1])
        return tuple(self.rows[row, self.first : column + 1].tolist())
