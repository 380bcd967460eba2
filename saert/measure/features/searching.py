"""Latents that answer a question about text, from the arrays of a feature index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saert.measure.features.files import Arrays
from saert.measure.features.store import CHUNK, Range
from saert.sparse import SparseCode

Labels = Mapping[int, str]


@dataclass(frozen=True)
class Found:
    """A latent that answers a search.

    Attributes:
        score: what the answers are ordered by.
        coverage: part of the tokens searched for at which it fires.
        share: part of all of its activation that falls on them.
        activation: the largest on them.
    """

    latent: int
    label: str | None
    score: float
    coverage: float
    share: float
    activation: float


def occurrences(
    tokens: NDArray[np.integer], used: NDArray[np.bool_], ways: Iterable[Sequence[int]]
) -> NDArray[np.bool_]:
    """bool [rows, context]: tokens that belong to an occurrence of one of `ways`, token ids in a
    row each, where `used`. ValueError for one of no tokens, or more than a row has."""
    context = tokens.shape[1]
    on = np.zeros(tokens.shape, bool)
    for said in ways:
        last = context - len(said) + 1
        if not said or last < 1:
            raise ValueError(f"search: {len(said)} tokens, expected 1 to {context}")
        begins = np.ones((len(on), last), bool)
        for i, token in enumerate(said):
            begins &= tokens[:, i : i + last] == token
        for i in range(len(said)):
            on[:, i : i + last] |= begins
    return on & used


def firing_on(
    on: NDArray[np.bool_], parts: Iterable[tuple[Range, Arrays]], labels: Labels, top: int
) -> list[Found]:
    """The latents that fire where `on` [rows, context], by coverage · share."""
    here = max(1, int(on.sum()))
    found = []
    for at, arrays in parts:
        n = at.stop - at.start
        hits, mass, largest = np.zeros(n), np.zeros(n), np.zeros(n)
        for a in range(0, len(arrays["locations"]), CHUNK):
            row, position, latent = arrays["locations"][a : a + CHUNK].astype(np.int64).T
            hit = on[row, position]
            latent, values = latent[hit], arrays["activations"][a : a + CHUNK][hit]
            hits += np.bincount(latent, minlength=n)
            mass += np.bincount(latent, values.astype(np.float64), minlength=n)
            np.maximum.at(largest, latent, values)
        share = mass / np.maximum(arrays["moments"][:, 0], np.finfo(np.float64).tiny)
        coverage = hits / here
        for j in np.flatnonzero(hits):
            score = float(coverage[j] * share[j])
            found.append((score, at.start + int(j), coverage[j], share[j], largest[j]))
    best = sorted(found, key=lambda one: (-one[0], one[1]))[:top]
    return [
        Found(i, labels.get(i), score, float(coverage), float(share), float(largest))
        for score, i, coverage, share, largest in best
    ]


def saying_most(
    code: SparseCode, seen: Tensor, rarity: Tensor, sums: Tensor, labels: Labels, top: int
) -> list[Found]:
    """The latents of a code [*tokens, k] by how near each comes to `seen`, its own largest
    activation, times its `rarity`; `sums` is of its activation elsewhere. All [num_latents]."""
    flat, values = (t.reshape(-1).cpu() for t in (code.indices, code.values.double()))
    largest = torch.zeros(code.num_latents, dtype=torch.float64)
    largest.scatter_reduce_(0, flat, values, "amax")
    mass = torch.zeros_like(largest).scatter_add_(0, flat, values)
    hits = torch.zeros_like(largest).scatter_add_(0, flat, (values > 0).double())
    near = largest / torch.maximum(seen.double(), largest).clamp(min=1e-30)
    score = near * rarity * (largest > 0)
    tokens = max(1, flat.numel() // max(1, code.k))
    total = mass + sums
    best = score.argsort(descending=True, stable=True)[:top].tolist()
    return [
        Found(
            i, labels.get(i), float(score[i]), float(hits[i]) / tokens, float(mass[i] / total[i]),
            float(largest[i]),
        )
        for i in best
        if score[i] > 0
    ]  # fmt: skip
