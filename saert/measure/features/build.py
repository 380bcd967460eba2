"""`feature_index`: one pass over text, which leaves on disk where every latent fires."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saert.measure.features.directions import (
    Unembedding,
    logit_lens,
    neighbours,
    unembedding,
)
from saert.measure.features.files import Arrays, intact, write, write_json
from saert.measure.features.index import FeatureIndex
from saert.measure.features.store import (
    OURS,
    Ints,
    Range,
    merge,
    ranges,
    shard_path,
    write_shard,
)
from saert.measure.features.vocabulary import vocabulary
from saert.measure.identity import (
    differences,
    model_identity,
    sae_identity,
    vocabulary_identity,
)
from saert.measure.passes import Special, encoded, sites
from saert.measure.progress import tracked
from saert.measure.reports.reconstruction import check_rows
from saert.sae import SAE

VERSION = 1
Rows = NDArray[np.int32]


def feature_index(
    model: Any,
    sae: SAE,
    rows: Tensor,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    labels: Mapping[int, Any] | None = None,
    special: Special | None = None,
    logits: int = 20,
    near: int = 10,
    splits: int = 8,
    shard_tokens: int = 2**17,
    batch: int = 16,
    dataset: str = "",
    progress: bool = True,
) -> FeatureIndex:
    """Every activation of every latent over rows of text, on disk, with what cards are made from.

    The call says what the index shall hold, not what to do: rows that are in the folder already
    are not encoded again. To go on after a kill, call it again; to add text, call it with the old
    rows followed by the new. Either way the files are those of a single run, byte for byte (on
    one machine, with one `batch`).

    Args:
        rows: int64 [rows, context]; pad on the right.
        folder: gets a folder named after the SAE's hookpoint, in the layout of delphi's cache.
            SAEs at other hookpoints may share it.
        tokenizer: puts the strings of the tokens beside the index, which exports need.
        labels: what is known of latents: {17: "dogs"} or {17: {"label": "dogs", …}}.
        special: the positions to leave out, such as BOS and padding; `saert.measure.passes`.
        logits, near: how many promoted and suppressed tokens, and decoder neighbours, to keep.
        splits: files that the dictionary is divided over.
        shard_tokens: tokens between two saved states; memory grows with it, not with `rows`.
        batch: rows of one forward pass.
        dataset: a name of the text, for exports.

    Activations are stored in float16, as delphi does, but in float32 where one of a file's
    exceeds 65,504; those below 3e-8 round to zero and count as silent.

    Raises ValueError if the folder holds another model, SAE, tokenizer, division, or other rows,
    or if the model is in training mode or has SAEs attached; TypeError or ValueError for rows that
    are no token ids of it.

    >>> index = feature_index(model, sae, rows, "features", tokenizer=tokenizer)
    >>> index.card(17).top[0].strings
    """
    read_at, write_at = sites(sae)
    if sae.activation.signed:
        raise ValueError(
            f"feature_index: {type(sae.activation).__name__} gives signed activations, but cards "
            "are made of activations of at least 0"
        )
    for name, value in (("splits", splits), ("shard_tokens", shard_tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    rows = check_rows(model, rows).cpu()
    place = Path(folder) / str(read_at)
    strings = None if tokenizer is None else vocabulary(tokenizer)
    identity: dict[str, Any] = {
        "version": VERSION,
        "model": model_identity(model, sae),
        "sae": sae_identity(sae),
        "num_latents": sae.num_latents,
        "context": rows.shape[1],
        "splits": len(files := ranges(sae.num_latents, splits)),
    }
    tokens = rows.numpy().astype(np.int32)
    used = np.ones(tokens.shape, bool) if special is None else ~special(rows).cpu().numpy()
    config = _claim(place, identity, strings)
    held = _held(place, files, tokens, used)
    through = unembedding(model, write_at, sae.d_out)
    config |= {
        # what delphi reads and what it calls it (delphi/config.py, CacheConfig)
        "model_name": identity["model"]["name"],
        "dataset_repo": dataset, "dataset_split": "", "dataset_name": "", "dataset_column": "text",
        "batch_size": batch, "cache_ctx_len": rows.shape[1], "ctx_len": rows.shape[1],
        "n_tokens": tokens.size, "n_splits": len(files),
        "logit_lens": through if isinstance(through, str) else "",
    }  # fmt: skip
    write_json(place / "config.json", config)
    if strings is not None:
        write_json(place / OURS / "vocabulary.json", strings)
    if labels is not None:
        write_json(place / OURS / "labels.json", {str(i): what for i, what in labels.items()})

    _directions(sae, through, place, files, logits, near, progress)
    if held[0] < len(tokens):
        size = max(1, shard_tokens // (tokens.shape[1] * batch)) * batch
        shards = _plan(place, tokens, used, held, size)
        todo = [shard for shard, ready in shards.items() if not ready]
        cells = [(shard, cell) for shard in todo for cell in _cells(shard, batch)]
        entries = []
        for (first, last), cell in tracked(cells, f"Indexing {read_at}", progress):
            entries.append(_entries(model, sae, rows, (first, last), cell, batch, special))
            if cell + batch >= last:
                path = shard_path(place, first, last)
                write_shard(path, tokens[first:last], used[first:last], entries, sae.num_latents)
                entries = []
        for at in tracked(files, "Sorting by latent", progress):
            merge(place, at, list(shards))
    shutil.rmtree(place / OURS / "shards", ignore_errors=True)
    return FeatureIndex.open(place)


def _claim(place: Path, identity: dict[str, Any], strings: list[str] | None) -> dict[str, Any]:
    """What `config.json` shall say of the index; ValueError if it is another's."""
    file = place / "config.json"
    tokenizer = None if strings is None else vocabulary_identity(strings)
    if not file.is_file():
        if any(place.glob("*.safetensors")):
            raise ValueError(f"{place} holds a cache without a config.json; choose another folder")
        return {"saert": identity | {"tokenizer": tokenizer}}
    config = json.loads(file.read_text("utf-8"))
    if "saert" not in config:
        raise ValueError(f"{place} holds a cache that saert did not make; choose another folder")
    held = dict(config["saert"])
    kept = held.pop("tokenizer", None)
    # names are for people: a model is the same wherever it lies
    told = [line for line in differences(held, identity) if not line.startswith("model.name")]
    if tokenizer and kept:
        told += differences(kept, tokenizer, "tokenizer")
    if told:
        raise ValueError(
            f"{place} holds another index; choose another folder. What differs:\n" + "\n".join(told)
        )
    return {"saert": held | {"tokenizer": tokenizer or kept}}


def _held(place: Path, files: list[Range], tokens: Rows, used: NDArray[np.bool_]) -> list[int]:
    """How many rows the files hold, each number once, fewest first; a torn or missing file holds
    none."""
    held = set[int]()
    for at in files:
        arrays = intact(place / at.name)
        n = 0 if arrays is None else len(arrays["tokens"])
        held.add(n)
        if arrays is None:
            continue
        if n > len(tokens) or not np.array_equal(arrays["tokens"], tokens[:n]):
            raise ValueError(
                f"{place} holds {n} rows, and the {len(tokens)} rows given do not begin with them; "
                "to add rows, give the old ones first, or choose another folder"
            )
        if not np.array_equal(arrays["used"], np.packbits(used[:n], axis=1)):
            raise ValueError(
                f"{place} was made with another `special`: other positions of its rows were left "
                "out; give the same one, or choose another folder"
            )
    return sorted(held)


def _plan(
    place: Path, tokens: Rows, used: NDArray[np.bool_], held: list[int], size: int
) -> dict[tuple[int, int], bool]:
    """Shards (first and last row, in order) that lead from row held[0] to the end, and whether each
    lies on the disk, whole and of these rows. The others end at multiples of `size`. None goes
    across a number in `held`, so that a file of the index lacks the whole of a shard or nothing."""
    found: dict[int, list[int]] = {}
    for path in sorted((place / OURS / "shards").glob("[0-9]*.safetensors")):
        first, last = map(int, path.stem.split("_"))
        arrays = intact(path)
        if (
            arrays is not None
            and last <= len(tokens)
            and np.array_equal(arrays["tokens"], tokens[first:last])
            and np.array_equal(arrays["used"], np.packbits(used[first:last], axis=1))
        ):
            found.setdefault(first, []).append(last)
    plan: dict[tuple[int, int], bool] = {}
    for done, end in pairwise(sorted({*held, len(tokens)})):
        while done < end:
            ready = [last for last in found.get(done, ()) if last <= end]
            last = max(ready, default=min((done // size + 1) * size, end))
            plan[done, last] = bool(ready)
            done = last
    return plan


def _cells(shard: tuple[int, int], batch: int) -> Iterator[int]:
    """First rows of the batches that cover a shard."""
    first, last = shard
    yield from range(first // batch * batch, last, batch)


@torch.no_grad()
def _entries(
    model: Any,
    sae: SAE,
    rows: Tensor,
    shard: tuple[int, int],
    cell: int,
    batch: int,
    special: Special | None,
) -> tuple[Ints, Ints, NDArray[np.float32]]:
    """Token numbers in the shard, latents and activations of one batch.

    A row always stands at the same place of a full batch, beside whatever rows: a product of
    another shape may round differently, and then an index made in two runs would not be one made
    in one.
    """
    part = rows[cell : cell + batch]
    part = torch.cat([part, part[-1:].expand(batch - len(part), -1)])
    code = next(encoded(model, sae, part, batch=batch, special=special)).code
    low, high = max(shard[0], cell), min(shard[1], cell + batch)
    code = code[low - cell : high - cell].to("cpu")
    values = code.values.float()
    half = values.half().float()
    values = torch.where(half.isinf(), values, half)
    row, position, slot = values.nonzero(as_tuple=True)
    where = (row + low - shard[0]) * rows.shape[1] + position
    latents = code.indices[row, position, slot]
    return where.numpy(), latents.numpy(), values[row, position, slot].numpy()


def _directions(
    sae: SAE,
    through: Unembedding | str,
    place: Path,
    files: list[Range],
    logits: int,
    near: int,
    progress: bool,
) -> None:
    """Logit lens and neighbours of every latent, a file for each range; those there are kept."""
    lens = not isinstance(through, str)
    wanted = {"neighbours": min(near, sae.num_latents - 1)}
    if isinstance(through, Unembedding):
        wanted["promoted"] = min(logits, len(through.weight))
    missing = [
        at
        for at in files
        if (arrays := intact(place / OURS / "directions" / at.name)) is None
        or any(name not in arrays or arrays[name].shape[1] != n for name, n in wanted.items())
        or ("promoted" in arrays) != lens
    ]
    for at in tracked(missing, "Logit lens and neighbours", progress):
        found = neighbours(sae.W_dec, near, at)
        if isinstance(through, Unembedding):
            found |= logit_lens(sae.W_dec, through, logits, at)
        arrays = {name: value.numpy() for name, value in found.items()}

        def fill(out: Arrays, arrays: Arrays = arrays) -> None:
            for name, value in arrays.items():
                out[name][:] = value

        shapes = {name: (value.dtype, value.shape) for name, value in arrays.items()}
        write(place / OURS / "directions" / at.name, shapes, fill)
