"""SAEDashboard's batch files, which Neuronpedia's import reads.

Format: `NeuronpediaDashboardBatch` and `neuronpedia_runner.py` of sae-dashboard 0.8. What an index
does not know stays empty there, as it does when the dashboard's own options are off: aligned and
correlated neurons, correlated features, the split of decoder weights over heads, the vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from saert.measure.features.cards import Card, Example, Selection
from saert.measure.features.directions import BINS
from saert.measure.features.exports.common import (
    cards,
    in_batches,
    layer_of,
    model_slug,
    put,
    set_slug,
)
from saert.measure.features.index import STANDARD, FeatureIndex

PER_FILE = 128


def to_sae_dashboard(
    index: FeatureIndex,
    folder: str | Path,
    *,
    model_id: str | None = None,
    sae_set: str | None = None,
    layer: int | None = None,
    latents: Iterable[int] | None = None,
    selection: Selection = STANDARD,
    progress: bool = True,
) -> list[Path]:
    """`batch-0.json`, … of 128 latents each, and `skipped_indexes.json` with those left out.

    Dead latents are left out, as SAEDashboard does. `model_id` and `sae_set` default to the
    model's name and to site and size of the dictionary. Raises ValueError if the index was made
    without a tokenizer.
    """
    folder = Path(folder)
    head = {
        "model_id": model_id or model_slug(index),
        "layer": layer_of(index) if layer is None else layer,
        "sae_set": sae_set or set_slug(index),
        "sae_id_suffix": None,
    }
    found = cards(index, latents, selection, "SAEDashboard", progress, alive=True)
    written: list[Path] = []
    there: set[int] = set()
    for i, part in enumerate(in_batches(found, PER_FILE)):
        there.update(card.latent for card in part)
        features = [_feature(index, card) for card in part]
        written.append(put(folder / f"batch-{i}.json", head | {"features": features}))
    skipped = {
        "model_id": head["model_id"], "layer": str(head["layer"]), "sae_set": head["sae_set"],
        "log_sparsity": 0, "skipped_indexes": sorted(set(range(len(index))) - there),
    }  # fmt: skip
    put(folder / "skipped_indexes.json", skipped)
    return written


def _feature(index: FeatureIndex, card: Card) -> dict[str, Any]:
    bars = len(card.heights)
    low, high = card.logit_span
    centres = low + (np.arange(len(card.logit_heights)) + 0.5) * (high - low) / BINS
    rows = index.config["n_tokens"] // index.context
    activations = [_activation(one, -1, card.largest, -1) for one in card.top]
    for i, band in enumerate(card.bands):
        part = band.count * card.density / card.count
        if i == len(card.bands) - 1:
            part += 1 - card.density  # SAEDashboard counts silent tokens to the lowest band
        activations += [_activation(one, band.low, band.high, part) for one in band.examples]
    return {
        "feature_index": card.latent,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [one.string for one in card.suppressed],
        "neg_values": [one.value for one in card.suppressed],
        "pos_str": [one.string for one in card.promoted],
        "pos_values": [one.value for one in card.promoted],
        "frac_nonzero": card.density,
        "freq_hist_data_bar_values": ((np.arange(bars) + 0.5) * card.largest / bars).tolist(),
        "freq_hist_data_bar_heights": card.heights.tolist(),
        "logits_hist_data_bar_heights": card.logit_heights.tolist(),
        "logits_hist_data_bar_values": centres.tolist(),
        "n_prompts_total": rows,
        "n_tokens_in_prompt": index.context,
        "dataset": index.config["dataset_repo"],
        "decoder_weights_dist": [],
        "activations": activations,
        "vector": [],
    }


def _activation(one: Example, low: float, high: float, part: float) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": part,
        "tokens": list(one.strings),
        "values": list(one.activations),
        "qualifying_token_index": one.peak,
    }
