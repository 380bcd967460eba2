"""Safetensors files that are written in place and read without loading: `np.memmap` on both sides.

The safetensors library writes tensors that are in memory; a range of an index need not fit there.
The format is 8 bytes of header length, a JSON header, and the tensors
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = dict[str, NDArray[Any]]
Shapes: TypeAlias = Mapping[str, tuple[Any, tuple[int, ...]]]  # dtype and shape by name

CODES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
NAMES = {np.dtype(dtype): code for code, dtype in CODES.items()}


class Damaged(ValueError):
    """A file that is cut short, or no safetensors file."""


def read(path: Path) -> Arrays:
    """The tensors of a file, mapped: nothing is read before it is looked at.

    Raises Damaged if the file is torn, FileNotFoundError if there is none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise Damaged(f"{path}: cut short at {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        begin = 8 + length
        end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: its header is no safetensors header") from error
    if size != end:
        raise Damaged(f"{path}: {size} bytes, expected {end}")
    whole = np.asarray(np.memmap(path, np.uint8, "r"))  # as a plain array, which slices faster
    found: Arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        part = whole[begin + first : begin + last].view(CODES[entry["dtype"]])
        found[name] = part.reshape(entry["shape"])
    return found


def intact(path: Path) -> Arrays | None:
    """The tensors of a file; None if it is torn or missing, so that it has to be made again."""
    try:
        return read(path)
    except (FileNotFoundError, Damaged):
        return None


def write(path: Path, shapes: Shapes, fill: Callable[[Arrays], None]) -> None:
    """Make a file in one step: others see all of it or none, whenever this process ends.

    `fill` gets the tensors to write to, mapped. What it raises leaves no file behind.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    offset = 0
    # wide dtypes first, so that every tensor is aligned
    order = sorted(shapes, key=lambda name: -np.dtype(shapes[name][0]).itemsize)
    for name in order:
        dtype, shape = shapes[name]
        end = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape)}
        header[name]["data_offsets"] = [offset, end]
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # the next try writes over what a kill left
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        if offset:
            whole = np.memmap(temporary, np.uint8, "r+", offset=8 + len(text), shape=(offset,))
        else:
            whole = np.empty(0, np.uint8)  # type: ignore[assignment]
        arrays: Arrays = {}
        for name in order:
            first, last = header[name]["data_offsets"]
            arrays[name] = whole[first:last].view(shapes[name][0]).reshape(shapes[name][1])
        fill(arrays)
        if offset:
            whole.flush()
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    commit(temporary, path)


def commit(temporary: Path, path: Path) -> None:
    """Rename once the bytes are on the disk, so that a power cut cannot leave a hollow file."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
