"""The index on disk: delphi's cache of sparse activations, and shards of what is not in it yet.

    FOLDER/resid_post.6/0_511.safetensors …        a file for each range of latents, both ends in it
        locations    uint16 | uint32 [n, 3]        row, position, latent - first latent of the file
        activations  float16 | float32 [n]         sorted by latent, then row, then position
        tokens       uint16 | int32 [rows, context]
        offsets      int64 [latents + 1]           latent i's entries are offsets[i] to offsets[i+1]
        moments      float64 [latents, 4]          Σ a, Σ a², Σ a³, Σ a⁴
        largest      float32 [latents]
        used         uint8 [rows, ⌈context/8⌉]     bits: which tokens were looked at
    FOLDER/resid_post.6/config.json
    FOLDER/resid_post.6/saert/shards/0_127.safetensors …      rows 0 to 126, until they are merged

The first three are all that delphi reads (`delphi/latents/loader.py`). It wants one file for a
range of latents, while a pass over text makes one for a range of rows: hence the shards, and a
counting sort that adds them to the ranges. A range knows by its tokens how many rows it holds, so
that a merge that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saert.measure.features.files import Arrays, intact, read, write

OURS = "saert"  # what delphi does not read lies in this folder, where it does not look
CHUNK = 2**21  # entries handled at once
HALF_MAX = float(np.finfo(np.float16).max)

Ints = NDArray[np.int64]
Entries = tuple[Ints, Ints, NDArray[np.float32]]  # rows, positions, activations


class Range(NamedTuple):
    """A file of the index: latents `start` to `stop` - 1."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.start}_{self.stop - 1}.safetensors"  # delphi's ends are inclusive


def ranges(num_latents: int, splits: int) -> list[Range]:
    """Delphi's division of the dictionary into `splits` files."""
    edges = np.linspace(0, num_latents, min(splits, num_latents) + 1).astype(int).tolist()
    return [Range(start, stop) for start, stop in pairwise(edges)]


def shard_path(place: Path, first: int, last: int) -> Path:
    """Where the shard of rows `first` to `last` - 1 lies."""
    return place / OURS / "shards" / f"{first}_{last}.safetensors"


def write_shard(
    path: Path,
    rows: NDArray[np.integer[Any]],
    used: NDArray[np.bool_],
    entries: Sequence[tuple[Ints, Ints, NDArray[np.float32]]],
    num_latents: int,
) -> None:
    """Rows [rows, context] with their entries: token number in the shard, latent, activation."""
    where, latents, values = (
        np.concatenate([part[i] for part in entries]) if entries else np.empty(0, np.int64)
        for i in range(3)
    )
    order = np.argsort(latents, kind="stable")  # entries come in token order, and keep it
    offsets = np.searchsorted(latents[order], np.arange(num_latents + 1))

    def fill(out: Arrays) -> None:
        out["where"][:], out["values"][:] = where[order], values[order]
        out["offsets"][:], out["tokens"][:] = offsets, rows
        out["used"][:] = np.packbits(used, axis=1)

    packed = (len(rows), -(-rows.shape[1] // 8))
    n = len(where)
    write(path, {
        "where": (np.uint32, (n,)), "values": (np.float32, (n,)), "used": (np.uint8, packed),
        "offsets": (np.int64, (num_latents + 1,)), "tokens": (np.int32, rows.shape),
    }, fill)  # fmt: skip


class _Source(NamedTuple):
    """Entries of one range, sorted as the range is: the file so far, or a part of a shard."""

    arrays: Arrays
    offsets: Ints
    first_row: int

    def chunks(self) -> Iterator[tuple[Ints, Ints, Entries]]:
        """Latents (from the range's start) and ranks within the latent, with their entries."""
        context = self.arrays["tokens"].shape[1]
        begin, end = int(self.offsets[0]), int(self.offsets[-1])
        for a in range(begin, end, CHUNK):
            b = min(a + CHUNK, end)
            inside = np.clip(self.offsets, a, b)
            counts = inside[1:] - inside[:-1]
            latents = np.repeat(np.arange(len(counts)), counts)
            ranks = np.arange(a, b) - self.offsets[latents]
            if "where" in self.arrays:
                row, position = np.divmod(self.arrays["where"][a:b].astype(np.int64), context)
                values = self.arrays["values"][a:b]
            else:
                row, position = self.arrays["locations"][a:b, :2].astype(np.int64).T
                values = self.arrays["activations"][a:b].astype(np.float32)
            yield latents, ranks, (row + self.first_row, position, values)

    @property
    def overflows(self) -> bool:
        if "values" not in self.arrays:
            return self.arrays["activations"].dtype == np.float32
        part = self.arrays["values"][int(self.offsets[0]) : int(self.offsets[-1])]
        return bool(part.size and part.max() > HALF_MAX)


def merge(place: Path, at: Range, shards: Sequence[tuple[int, int]]) -> None:
    """Add shards (first and last row), in order, to a range that holds none or all of the rows of
    each; those that it holds are left out.

    The memory this takes does not grow with the index.
    """
    path = place / at.name
    old = intact(path)
    held = 0 if old is None else len(old["tokens"])
    sources = [] if old is None else [_Source(old, old["offsets"], 0)]
    rows = held
    for first, last in shards:
        if last > held:
            assert first == rows, f"{path}: rows {first} to {last - 1} do not follow its {rows}"
            arrays = read(shard_path(place, first, last))
            sources.append(_Source(arrays, arrays["offsets"][at.start : at.stop + 1], first))
            rows = last
    if rows == held:
        return
    latents = at.stop - at.start
    context = sources[0].arrays["tokens"].shape[1]
    offsets = np.zeros(latents + 1, np.int64)
    np.cumsum(sum(np.diff(source.offsets) for source in sources), out=offsets[1:])
    largest_id = max((int(s.arrays["tokens"].max(initial=0)) for s in sources), default=0)
    small = max(rows, latents, context) <= 2**16
    n = int(offsets[-1])

    def fill(out: Arrays) -> None:
        out["offsets"][:] = offsets
        row = 0
        taken = offsets[:-1].copy()
        for source in sources:
            for latent, rank, (where, position, values) in source.chunks():
                to = taken[latent] + rank
                out["locations"][to] = np.stack([where, position, latent], 1)
                out["activations"][to] = values
            taken += np.diff(source.offsets)
            end = row + len(source.arrays["tokens"])
            out["tokens"][row:end], out["used"][row:end] = (
                source.arrays["tokens"], source.arrays["used"],
            )  # fmt: skip
            row = end
        _summarise(out)

    write(path, {
        "locations": (np.uint16 if small else np.uint32, (n, 3)),
        "activations": (np.float32 if any(s.overflows for s in sources) else np.float16, (n,)),
        "tokens": (np.uint16 if largest_id < 2**16 else np.int32, (rows, context)),
        "used": (np.uint8, (rows, -(-context // 8))),
        "offsets": (np.int64, offsets.shape),
        "moments": (np.float64, (latents, 4)),
        "largest": (np.float32, (latents,)),
    }, fill)  # fmt: skip


def _summarise(out: Arrays) -> None:
    """Power sums and the maximum of every latent, in float64."""
    offsets = out["offsets"]
    out["moments"][:], out["largest"][:] = 0, 0
    latent = 0
    while latent < len(offsets) - 1:
        # whole latents, as many as fit a chunk, and at least one
        stop = int(np.searchsorted(offsets, offsets[latent] + CHUNK, "right")) - 1
        stop = min(max(stop, latent + 1), len(offsets) - 1)
        a = out["activations"][offsets[latent] : offsets[stop]].astype(np.float64)
        starts = offsets[latent:stop] - offsets[latent]
        alive = np.flatnonzero(np.diff(offsets[latent : stop + 1]))
        if len(alive):
            for power in range(4):
                sums = np.add.reduceat(a ** (power + 1), starts[alive])
                out["moments"][latent + alive, power] = sums
            out["largest"][latent + alive] = np.maximum.reduceat(a, starts[alive])
        latent = stop
