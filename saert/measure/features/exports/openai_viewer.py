"""Files for OpenAI's sae-viewer: `atoms/{latent}.json`.

Format: `types.ts`, `histogram.tsx` and `featureInfo.tsx` of openai/sparse_autoencoder. The keys
about ablation (`ablate_loss_diff`, `kl`, up- and downvotes) hold a number for every token of an
example; an index has none, so they are left out, which the viewer allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from saert.measure.features.cards import Card, Example, Selection
from saert.measure.features.exports.common import cards, put
from saert.measure.features.index import STANDARD, FeatureIndex

BIN_WIDTH = 0.2  # fixed in the viewer


def to_openai_viewer(
    index: FeatureIndex,
    folder: str | Path,
    *,
    latents: Iterable[int] | None = None,
    selection: Selection = STANDARD,
    progress: bool = True,
) -> list[Path]:
    """`atoms/0.json`, …, a file for each latent, dead ones included.

    Its "random" examples are draws from bands of activation, not from all tokens alike. Raises
    ValueError if the index was made without a tokenizer.
    """
    atoms = Path(folder) / "atoms"
    return [
        put(atoms / f"{card.latent}.json", _feature(index, card))
        for card in cards(index, latents, selection, "OpenAI viewer", progress, alive=False)
    ]


def _feature(index: FeatureIndex, card: Card) -> dict[str, Any]:
    first, second, third, fourth = card.moments
    bins, counts = np.unique(
        np.ceil(index.entries(card.latent)[2].astype(np.float64) / BIN_WIDTH).astype(int),
        return_counts=True,
    )
    return {
        "density": card.density,
        "mean_act": first,
        "mean_act_squared": second,
        "skew": third / second**1.5 if second else 0.0,
        "kurtosis": fourth / second**2 if second else 0.0,
        "hist": {str(b): n for b, n in zip(bins.tolist(), counts.tolist(), strict=True)},
        "random": [_sequence(one, card) for band in card.bands for one in band.examples],
        "top": [_sequence(one, card) for one in card.top],
    }


def _sequence(one: Example, card: Card) -> dict[str, Any]:
    return {
        "density": card.density,
        "doc_id": one.row,
        "idx": one.peak,
        "acts": list(one.activations),
        "act": one.activations[one.peak],
        "tokens": list(one.strings),
        "token_ints": list(one.tokens),
    }
