"""A feature index without any data: over text that the model writes itself, kept between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from saert.measure.features.build import VERSION, feature_index
from saert.measure.features.files import intact, write
from saert.measure.features.index import FeatureIndex
from saert.measure.features.vocabulary import vocabulary
from saert.measure.identity import model_identity, sae_identity, vocabulary_identity
from saert.measure.passes import Special
from saert.own_text import own_text
from saert.sae import SAE

Told = Callable[[float, str], None]
"""Hears what part is done, from 0 to 1, and what is being done."""


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where what can be made again is kept: `folder`, else $SAERT_CACHE, else `saert` in
    $XDG_CACHE_HOME or ~/.cache."""
    if folder is None and not (folder := os.environ.get("SAERT_CACHE")):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saert"
    return Path(folder)


def own_index(
    model: Any,
    tokenizer: Any,
    sae: SAE,
    *,
    labels: Mapping[int, Any] | None = None,
    rows: int = 256,
    context: int = 128,
    cache: str | Path | None = None,
    folder: str | Path | None = None,
    told: Told | None = None,
) -> FeatureIndex:
    """What an SAE's latents fire on in text that the model writes by itself.

    The text is written once for each model and the index made once for each SAE; both are kept in
    the cache, under names made from the weights, so that a changed model or SAE has its own. Two
    processes that ask at once make them once; what a kill left torn is made again.

    Args:
        rows, context: so many rows of so many tokens, as far as the model holds them. On the
            bundled model and two CPU cores the standard text takes 11 s, an index 1.3 s.
        labels: what is known of latents, as `feature_index` takes it.
        cache: a folder; `cache_folder()` by default.
        folder: where this index goes, if not into the cache: for one that is not to be kept.
        told: called with what part is done and what is being done. What it raises ends the work.

    Raises ValueError for a tokenizer without a start token, and what `feature_index` raises.

    >>> index = own_index(model, tokenizer, sae)
    >>> index.card(17).top[0].strings
    """
    say: Told = told or (lambda part, what: None)
    place = cache_folder(cache)
    text = own_rows(model, tokenizer, sae, rows=rows, context=context, cache=place, told=told)
    say(0.9, "gathering examples")
    key = {
        "version": VERSION,
        "model": model_identity(model, sae)["fingerprint"],
        "sae": sae_identity(sae),
        "tokenizer": vocabulary_identity(vocabulary(tokenizer)),
        "text": sha256(text.numpy().tobytes()).hexdigest(),
    }
    target = place / "features" / _digest(key) if folder is None else Path(folder)
    with _alone(target):
        index = feature_index(
            model, sae, text, target, tokenizer=tokenizer, labels=labels or {},
            special=specials(tokenizer), dataset="written by the model itself", progress=False,
        )  # fmt: skip
    say(1.0, "done")
    return index


def own_rows(
    model: Any,
    tokenizer: Any,
    sae: SAE,
    *,
    rows: int = 256,
    context: int = 128,
    cache: str | Path | None = None,
    told: Told | None = None,
) -> Tensor:
    """int64 [rows, context]: text of the model, from the cache if it was written before."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise ValueError("the tokenizer has no start token for the model to write from")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context
    shape = (rows, min(context, limit))
    model_name = model_identity(model, sae)["fingerprint"]
    path = cache_folder(cache) / "text" / f"{_digest([model_name, start, *shape])}.safetensors"
    with _alone(path):
        held = intact(path)
        if held is None or held["rows"].shape != shape:
            say: Told = told or (lambda part, what: None)
            say(0.0, "writing text to gather examples from")
            made = own_text(
                model, start, *shape,
                told=lambda done, of: say(0.9 * done / of, "writing text to gather examples from"),
            ).numpy()  # fmt: skip

            def fill(out: Mapping[str, Any]) -> None:
                out["rows"][:] = made

            write(path, {"rows": (np.int64, shape)}, fill)
            return torch.from_numpy(made)
    return torch.from_numpy(np.array(held["rows"]))


def specials(tokenizer: Any) -> Special:
    """Which of some token ids are the tokenizer's special tokens."""
    ids = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
    return lambda rows: torch.isin(rows, ids.to(rows.device))


def _digest(what: Any) -> str:
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _alone(path: Path) -> FileLock:
    """Only one process or thread at a time makes what lies at a path; the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))
