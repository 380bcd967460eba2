"""Bodies for Neuronpedia's `POST /api/feature/upload-batch`, the upload that anybody may use.

Format: `FeatureRequest.upload_batch` of neuronpedia 1.2.1. Make the source set first
(`SourceSet.new`), then post each file, or rebuild its features with the client's own classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saert.measure.features.cards import Band, Card, Example, Logit, Selection
from saert.measure.features.exports.common import (
    cards,
    in_batches,
    layer_of,
    model_slug,
    put,
    set_slug,
    slug,
)
from saert.measure.features.index import STANDARD, FeatureIndex

MAX_FEATURES, MAX_TOKENS, MAX_LOGITS = 128, 1024, 20


def to_neuronpedia(
    index: FeatureIndex,
    folder: str | Path,
    *,
    model_id: str | None = None,
    source_set: str | None = None,
    layer: int | None = None,
    latents: Iterable[int] | None = None,
    selection: Selection = STANDARD,
    progress: bool = True,
) -> list[Path]:
    """`upload-batch-0.json`, …: at most 128 latents each, for source `{layer}-{source_set}`.

    Neuronpedia takes no feature without an activation, so dead latents are left out. Labels
    become explanations. Ids are put into lower case, as its pages need. Raises ValueError for
    examples of more than 1,024 tokens, and if the index was made without a tokenizer.
    """
    width = selection.before + 1 + selection.after
    if width > MAX_TOKENS:
        raise ValueError(f"examples of {width} tokens, Neuronpedia takes {MAX_TOKENS}")
    if selection.top < 1:
        raise ValueError("top is 0, but Neuronpedia takes no feature without an activation")
    layer = layer_of(index) if layer is None else layer
    head = {
        "modelId": slug(model_id or model_slug(index)),
        "source": f"{layer}-{slug(source_set or set_slug(index))}",
    }
    found = cards(index, latents, selection, "Neuronpedia", progress, alive=True)
    written = []
    for i, part in enumerate(in_batches(found, MAX_FEATURES)):
        body = head | {"features": [_feature(card) for card in part]}
        written.append(put(Path(folder) / f"upload-batch-{i}.json", body))
    return written


def _feature(card: Card) -> dict[str, Any]:
    activations = [_activation(one, None, card) for one in card.top]
    activations += [_activation(one, band, card) for band in card.bands for one in band.examples]
    explanations = [{"text": card.label, "methodName": None, "modelName": None}]
    return {
        "index": card.latent,
        "density": card.density,
        "activations": activations,
        "explanations": explanations if card.label else [],
        "topLogits": [_logit(one) for one in card.promoted[:MAX_LOGITS]],
        "bottomLogits": [_logit(one) for one in card.suppressed[:MAX_LOGITS]],
    }


def _activation(one: Example, band: Band | None, card: Card) -> dict[str, Any]:
    return {
        "tokens": list(one.strings),
        "values": list(one.activations),
        "quantileMin": None if band is None else band.low,
        "quantileMax": None if band is None else band.high,
        "quantileFraction": None if band is None else band.count / card.count,
    }


def _logit(one: Logit) -> dict[str, Any]:
    return {"token": one.string, "value": one.value}
