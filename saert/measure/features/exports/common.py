"""What all exports need: which latents, under which names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saert.measure.features.cards import Card, Selection
from saert.measure.features.index import FeatureIndex
from saert.measure.progress import tracked


def cards(
    index: FeatureIndex,
    latents: Iterable[int] | None,
    selection: Selection,
    what: str,
    progress: bool,
    alive: bool,
) -> Iterator[Card]:
    """The cards of the latents (all of them unless given), in order; only living ones if asked.

    Raises ValueError if the index has no token strings.
    """
    if not index.vocabulary:
        raise ValueError(
            f"{index.place} has no token strings, which every viewer shows: run the same "
            "feature_index with tokenizer=…; nothing is encoded again"
        )
    chosen = range(len(index)) if latents is None else sorted(set(latents))
    dead = set(index.dead.tolist()) if alive else set()
    wanted = [latent for latent in chosen if latent not in dead]
    return (index.card(latent, selection) for latent in tracked(wanted, what, progress))


def in_batches(found: Iterator[Card], size: int) -> Iterator[Sequence[Card]]:
    """Lists of `size` cards; the last may be shorter."""
    part: list[Card] = []
    for card in found:
        part.append(card)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def put(path: Path, value: Any) -> Path:
    """A JSON file in ASCII, so that no token can break it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False), encoding="ascii")
    return path


def slug(name: str) -> str:
    """A name as Neuronpedia wants its ids: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def model_slug(index: FeatureIndex) -> str:
    """`gpt2` for a Hub id, the folder's own name for a path."""
    name = str(index.config["saert"]["model"]["name"])
    return slug(name.rstrip("/").rpartition("/")[2])


def set_slug(index: FeatureIndex) -> str:
    """`resid-post-1024`: site and size of the dictionary."""
    site = index.hookpoint.site or re.sub(r"\.\d+", "", str(index.hookpoint.path))
    return f"{slug(site)}-{len(index)}"


def layer_of(index: FeatureIndex) -> int:
    """The block that the hookpoint is at; 0 for the embedding. ValueError if it names none."""
    hookpoint = index.hookpoint
    if hookpoint.path is None:
        return hookpoint.layer or 0
    numbers = re.findall(r"(?<=\.)\d+", f".{hookpoint.path}")
    if len(numbers) != 1:
        raise ValueError(f"{hookpoint}: expected one layer number in it; give layer=")
    return int(numbers[0])
