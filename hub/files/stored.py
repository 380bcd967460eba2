"""One tensor in a file, unread: what `tensors_safetensors`, `_npz` and `_pt` find."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

from saert.hub.errors import FormatError

READABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
}  # fmt: skip


class Stream(Protocol):
    """The bytes of one tensor, first to last."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@dataclass(frozen=True)
class Stored:
    """Shape and dtype; `open` gives the bytes, row after row (columns if `column_major`).

    Raises FormatError for a dtype or a dimension that no weights have.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    open: Callable[[], AbstractContextManager[Stream]]
    column_major: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in READABLE:
            raise FormatError(f"holds {self.dtype}, expected floats of 16 to 64 bits or integers")
        if any(type(size) is not int or size < 1 for size in self.shape):
            raise FormatError(f"is {list(self.shape)}, expected dimensions of at least 1")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def part(path: Path, start: int) -> FileIO:
    """A file, to be read from a byte on. Unbuffered: a tensor is read in large pieces."""
    file = FileIO(path)
    file.seek(start)
    return file
