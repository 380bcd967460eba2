"""The tensors of one file, read when asked for, straight onto their device and dtype.

Nothing is mapped: bytes go from the file into the tensor they belong to, through a buffer of a few
megabytes where they change dtype, order or device. So loading needs the weights and that buffer,
whatever the file's layout, and nothing loaded still looks at the file. Every size is checked
against the file's before anything is allocated.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saert.hub.errors import FormatError, reading
from saert.hub.files.stored import Stored, Stream
from saert.hub.files.tensors_npz import read_npz
from saert.hub.files.tensors_pt import read_pt
from saert.hub.files.tensors_safetensors import read_safetensors
from saert.hub.sources.folder import file_size
from saert.kernels.numerics import accumulation_dtype

# torch copies fewer elements than 32,768 without waking its threads, which costs more than it gains
# where others compute at the same time
SERIAL = (1 << 15) - 1
BLOCK_BYTES = 1 << 21  # computed with at once
BUFFER_BYTES = 2 << 20  # stays in the cache
LARGE = 1 << 20
POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux
PIECE_BYTES = 1 << 18  # read at once: a zip archive's stream keeps several copies
_KINDS: dict[str, Callable[[Path], tuple[dict[str, Stored], dict[str, Any]]]] = {
    ".safetensors": read_safetensors, ".npz": read_npz, ".pt": read_pt, ".pth": read_pt,
    ".bin": read_pt,
}  # fmt: skip
SUFFIXES = tuple(_KINDS)
"""Of the files that can be weights."""


class Tensors:
    """`names`, `shape`, `stored_dtype` and `get` of a weights file. Make one with `open_tensors`.

    `extras` holds what a `.pt` keeps beside its tensors (numbers, strings, nested dicts).
    """

    def __init__(
        self,
        path: Path,
        stored: Mapping[str, Stored],
        extras: Mapping[str, Any],
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        self.path, self.device, self.dtype = path, torch.device(device), dtype
        self.extras, self._stored = extras, stored
        self.names = frozenset(stored)

    def _find(self, name: str) -> Stored:
        if (found := self._stored.get(name)) is None:
            raise FormatError(
                f"{self.path.name}: no tensor {name!r}; it holds {sorted(self.names)[:20]}"
            )
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._find(name).dtype

    def get(
        self, name: str, *, transpose: bool = False, compared: bool = False, exact: bool = False
    ) -> Tensor:
        """One tensor in memory of its own, on the device, in the dtype asked for.

        Integers keep their dtype, and only numbers and lists of them may be integers.

        Args:
            transpose: of a matrix.
            compared: never rounded below float32 by the dtype asked for, because it is compared
                with scores (thresholds, gates); a stored half-precision one stays as it is.
            exact: at least float32, because it will be rescaled before it is cast (`cast`).

        Raises FormatError if the file ends early or its checksum is wrong.
        """
        one = self._find(name)
        dtype = one.dtype
        if dtype.is_floating_point:
            dtype = self.dtype or dtype
            if exact or (compared and self.dtype is not None):
                dtype = accumulation_dtype(dtype)
        elif len(one.shape) > 1:
            raise FormatError(f"{self.path.name}: {name} holds {dtype}, expected floats")
        if transpose and len(one.shape) != 2:
            raise FormatError(f"{self.path.name}: {name} is {list(one.shape)}, expected a matrix")
        in_file = one.shape[::-1] if one.column_major else one.shape
        matrix = len(one.shape) == 2
        flip = matrix and transpose != one.column_major
        out = _allocate(in_file[::-1] if flip else in_file, dtype, self.device)
        with reading(self.path, f"{one.num_bytes} bytes of {name}"), one.open() as stream:
            (_fill_transposed if flip else _fill)(out, stream, one.dtype)
        if one.column_major and not matrix:
            return out.permute(*reversed(range(out.dim()))).contiguous()
        return out

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor that was rescaled in `exact` precision, in the dtype asked for."""
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def blocks(
        self, name: str, *, transpose: bool = False
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """A matrix as `get` turns it, a few of its rows or columns at a time: which, and the block.

        Blocks are on the CPU, in at least float32 and the dtypes stored and asked for. They may be
        changed, and the next one overwrites them.
        """
        one = self._find(name)
        if len(one.shape) != 2 or not one.dtype.is_floating_point:
            raise FormatError(
                f"{self.path.name}: {name} is {list(one.shape)} of {one.dtype}, expected a matrix "
                "of floats"
            )
        rows, columns = one.shape[::-1] if one.column_major else one.shape  # as the file has them
        flip = transpose != one.column_major
        most = BLOCK_BYTES // (4 * columns)
        step = max(1, min(32, rows // 24, most) if flip else most)
        buffer = torch.empty(step, columns, dtype=one.dtype)
        with reading(self.path, f"{one.num_bytes} bytes of {name}"), one.open() as stream:
            for start in range(0, rows, step):
                part = buffer[: rows - start]
                _read(stream, part)
                wide = part.to(self._wide(name))
                some, every = slice(start, start + len(part)), slice(None)
                yield (every, some, wide.T) if flip else (some, every, wide)

    def scaled(self, name: str, by: Tensor | float, *, transpose: bool = False) -> Tensor:
        """A matrix as `get` turns it, its rows multiplied before they are rounded.

        In the dtype asked for, or else at least float32, however it is stored. Needs that memory
        and a few megabytes.

        Args:
            by: for all, or one factor for each row of the result: [rows].
        """
        shape = self.shape(name)[::-1] if transpose else self.shape(name)
        wide = self._wide(name)
        factors = torch.as_tensor(by, dtype=wide, device="cpu").expand(shape[0])[:, None]
        out = _allocate(shape, self.dtype or wide, self.device)
        for rows, columns, block in self.blocks(name, transpose=transpose):
            out[rows, columns] = block.mul_(factors[rows])
        return out

    def row_norms(self, name: str, *, transpose: bool = False) -> Tensor:
        """Euclidean lengths of the rows of a matrix as `get` turns it: [rows], at least float32."""
        rows = self.shape(name)[-1 if transpose else 0]
        squares = torch.zeros(rows, dtype=torch.float64)
        for some, _, block in self.blocks(name, transpose=transpose):
            squares[some] += torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square()
        return squares.sqrt().to(self.device, self._wide(name))

    def _wide(self, name: str) -> torch.dtype:
        """What is rescaled is computed in."""
        stored = self.stored_dtype(name)
        return accumulation_dtype(torch.promote_types(stored, self.dtype or stored))


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor; a large one on the CPU in pages that are there already.

    Pages that appear one by one, as they are written, cost more than reading what goes into them.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not POPULATE:
        return torch.empty(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | POPULATE
    memory = mmap.mmap(-1, size, flags=flags)  # lives as its tensor
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _read(stream: Stream, out: Tensor) -> None:
    """The next bytes of a stream, into a contiguous tensor on the CPU."""
    left = out.reshape(-1).view(torch.uint8).numpy().data
    while left:
        count = stream.readinto(left[:PIECE_BYTES])
        if not count:
            raise EOFError(f"the file ends {len(left)} bytes early")
        left = left[count:]


def _fill(out: Tensor, stream: Stream, stored: torch.dtype) -> None:
    """Contiguous, in the file's order."""
    if out.device.type == "cpu" and out.dtype == stored:
        _read(stream, out)
        return
    flat = out.view(-1)
    buffer = torch.empty(min(flat.numel(), _at_once(out)), dtype=stored)
    for start in range(0, flat.numel(), buffer.numel()):
        part = buffer[: flat.numel() - start]
        _read(stream, part)
        flat[start : start + part.numel()].copy_(part)


def _at_once(out: Tensor) -> int:
    """How many elements to copy by one call."""
    return SERIAL if out.device.type == "cpu" else 1 << 22


def _fill_transposed(out: Tensor, stream: Stream, stored: torch.dtype) -> None:
    """`out` is [columns, rows] of a file that holds row after row."""
    columns, rows = out.shape
    # enough rows at once to write whole cache lines, and a small part of the matrix
    step = max(1, min(32, rows // 24))
    high = max(1, _at_once(out) // step)
    buffer = torch.empty(step * columns, dtype=stored)
    turned = torch.empty(step * columns, dtype=stored)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = buffer[: count * columns].view(count, columns)
        _read(stream, part)
        block = turned[: count * columns].view(columns, count).copy_(part.T)
        places = out[:, start : start + count].split(high)
        for place, some in zip(places, block.split(high), strict=True):
            place.copy_(some)


def open_tensors(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tensors:
    """The tensors of a `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin` file.

    Raises FormatError for a file of another kind, or one that is corrupt, truncated or unsafe.
    """
    if (read := _KINDS.get(path.suffix)) is None:
        raise FormatError(f"{path.name}: expected one of {', '.join(SUFFIXES)}")
    if not file_size(path):
        raise FormatError(f"{path.name}: an empty file, expected tensors")
    with reading(path, f"the tensors of a {path.suffix} file"):
        try:
            stored, extras = read(path)
        except FormatError as error:
            raise FormatError(f"{path.name}: {error}") from error
    return Tensors(path, stored, extras, device, dtype)
