"""Short names for latents that nobody labelled: the tokens they fire on most strongly."""

from __future__ import annotations

import numpy as np

from saert.measure.features.index import FeatureIndex

STRONG = 0.5  # of the largest activation: where a latent is named after
LEAST = 0.15  # of the activation there: what a token needs to be named


def automatic_name(index: FeatureIndex, latent: int, most: int = 3) -> str:
    """A latent's strongest tokens, quoted as they are spelt: “ park”, “ garden”.

    Of the activations above half of the largest, the tokens that hold the largest part of the sum:
    at most `most` of them, each with 15% or more. "various tokens" if no token holds so much,
    "never fires" for a dead latent, empty for an index that was made without a tokenizer.
    ValueError if there is no such latent.
    """
    rows, positions, values = index.entries(latent)
    if not len(values):
        return "never fires"
    if not index.vocabulary:
        return ""
    strong = values >= STRONG * values.max()
    tokens = index.tokens_at(rows[strong], positions[strong])
    ids, where = np.unique(tokens, return_inverse=True)
    mass = np.bincount(where, values[strong].astype(np.float64))
    best = np.argsort(-mass, kind="stable")[:most]
    named = [ids[i] for i in best if mass[i] >= LEAST * mass.sum()]
    if not named:
        return "various tokens"
    names = index.strings([int(i) for i in named])
    return ", ".join(f"“{name}”".replace("\n", "⏎") for name in names)
