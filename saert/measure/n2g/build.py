"""Building N2G graphs: what an activation needs, found by running the model on altered text.

The algorithm is that of OpenAI's `sparse_autoencoder/explanations.py` (ALGORITHMS.md 1.10); here
the sequences of many examples run together, each of them once, as far as the hookpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.capture import capture
from saert.hooks import device_of
from saert.measure.n2g.graph import ANY, Pattern
from saert.measure.passes import check_ready, sites
from saert.sae import SAE

Tokens = tuple[int, ...]
Activate = Callable[[Sequence[Tokens], Sequence[int]], list[float]]
"""(sequences, one latent for each) -> the activation of the latent at the sequence's last token."""

KEPT = 0.5  # of an activation: what a shorter or altered text has to leave of it


@dataclass(frozen=True)
class Example:
    """An activation: the tokens from the start of its sequence up to its own, and how strong."""

    latent: int
    tokens: Tokens
    value: float


@dataclass(frozen=True)
class Suffix:
    """The shortest end of an example's tokens that keeps half of its activation."""

    example: Example
    tokens: Tokens
    value: float


def find_patterns(
    activate: Activate, examples: Sequence[Example], pad: int, longest: int | None = None
) -> list[Pattern]:
    """One pattern per example, in order.

    Args:
        pad: the token that stands for "something else": before a suffix, to see whether it has to
            begin the sequence, and in place of each of its tokens, to see whether that one counts.
        longest: the longest sequence that `activate` takes; a suffix that fills it has no token
            before it and counts as bound to the start.
    """
    suffixes = shortest_suffixes(activate, examples)
    movable = [s for s in suffixes if longest is None or len(s.tokens) < longest]
    padded = activate([(pad, *s.tokens) for s in movable], [s.example.latent for s in movable])
    free = {
        id(s) for s, value in zip(movable, padded, strict=True) if value / s.example.value >= KEPT
    }
    altered = [
        (*s.tokens[:i], pad, *s.tokens[i + 1 :]) for s in suffixes for i in range(len(s.tokens))
    ]
    owners = [s.example.latent for s in suffixes for _ in s.tokens]
    left = iter(activate(altered, owners))
    return [
        Pattern(
            tuple(t if 1 - next(left) / s.value >= KEPT else ANY for t in s.tokens),
            id(s) not in free,
            s.value,
        )
        for s in suffixes
    ]


def shortest_suffixes(activate: Activate, examples: Sequence[Example]) -> list[Suffix]:
    """For each example the shortest suffix with at least half of its activation at the end; the
    whole of it, with its own activation, where none has.

    Lengths are tried in rounds 1, 2, 3–4, 5–8, …: at most twice the work of one by one, in few
    large batches.
    """
    found: dict[int, Suffix] = {}
    low, high = 1, 1
    while waiting := [i for i in range(len(examples)) if i not in found]:
        tries = [
            (i, n) for i in waiting for n in range(low, min(high, len(examples[i].tokens)) + 1)
        ]
        ends = [examples[i].tokens[-n:] for i, n in tries]
        values = activate(ends, [examples[i].latent for i, _ in tries])
        for (i, _), end, value in zip(tries, ends, values, strict=True):
            if i not in found and value / examples[i].value >= KEPT:
                found[i] = Suffix(examples[i], end, value)
        for i in waiting:
            if len(examples[i].tokens) <= high:
                found.setdefault(i, Suffix(examples[i], examples[i].tokens, examples[i].value))
        low, high = high + 1, 2 * high
    return [found[i] for i in range(len(examples))]


class Probe:
    """Activations of single latents at the end of token sequences, by running the model.

    Sequences are padded on the right, which a causal model does not see, and no more than
    `tokens` go through it at once. `before` stands in front of every sequence (a BOS, or nothing).
    """

    def __init__(self, model: Any, sae: SAE, before: Tokens = (), tokens: int = 2048) -> None:
        self.model, self.sae, self.before, self.tokens = model, sae, before, tokens
        check_ready(model)
        self.read, _ = sites(sae)
        self.device = device_of(model)

    def __call__(self, sequences: Sequence[Tokens], latents: Sequence[int]) -> list[float]:
        askers: dict[Tokens, list[int]] = defaultdict(list)
        for i, sequence in enumerate(sequences):
            askers[sequence].append(i)
        values = [0.0] * len(sequences)
        part: list[Tokens] = []
        for sequence in sorted(askers, key=lambda s: (len(s), s)):
            if part and (len(part) + 1) * (len(sequence) + len(self.before)) > self.tokens:
                self._run(part, askers, latents, values)
                part = []
            part.append(sequence)
        if part:
            self._run(part, askers, latents, values)
        return values

    def _run(
        self,
        part: Sequence[Tokens],
        askers: dict[Tokens, list[int]],
        latents: Sequence[int],
        values: list[float],
    ) -> None:
        x = self._last_hidden([(*self.before, *sequence) for sequence in part])
        who = [i for sequence in part for i in askers[sequence]]
        row = [r for r, sequence in enumerate(part) for _ in askers[sequence]]
        asked = torch.tensor([latents[i] for i in who], device=x.device).unsqueeze(-1)
        if self.sae.activation.per_latent:
            found = self.sae.activations(x[row], asked)
        else:  # one ranking of all latents serves everyone who asks for the sequence
            found = self.sae.encode(x)[row].at(asked)
        for i, value in zip(who, found.squeeze(-1).tolist(), strict=True):
            values[i] = value

    def _last_hidden(self, part: Sequence[Tokens]) -> Tensor:
        lengths = torch.tensor([len(sequence) for sequence in part])
        width = int(lengths.max())
        rows = torch.tensor([(*s, *(0,) * (width - len(s))) for s in part], device=self.device)
        hidden = capture(self.model, rows, (self.read,), batch=len(part))[self.read]
        ends = torch.arange(len(part)) * width + lengths - 1
        return hidden[ends.to(hidden.device)].to(self.sae.device)
