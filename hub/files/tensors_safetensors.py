"""`.safetensors`: eight bytes of length, a JSON header, and the tensors one after the other.

Read without the library, which maps the file: its pages count as memory of the process, and a file
that is overwritten would change weights already loaded.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from saert.hub.errors import FormatError
from saert.hub.files.parse import MOST_BYTES, parse_json
from saert.hub.files.stored import Stored, part
from saert.hub.sources.folder import file_size

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a file; nothing beside them.

    Raises FormatError if the header is larger than 4 MB or does not describe the file byte for
    byte: tensors overlap, leave gaps, or end before or after it.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_BYTES):
            raise FormatError(
                f"a header of {length} bytes in a file of {size}, expected at most {MOST_BYTES}"
            )
        header = parse_json(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise FormatError(f"the header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    stored, spans = {}, []
    for name, entry in header.items():
        try:
            start, stop = entry["data_offsets"]
            one = _stored(path, entry, 8 + length + start)
        except FormatError as error:
            raise FormatError(f"{name} {error}") from None
        if stop - start != one.num_bytes:
            raise FormatError(f"{name} has {stop - start} bytes, expected {one.num_bytes}")
        stored[name] = one
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise FormatError(f"a tensor starts at byte {start}, expected {end}")
        end = stop
    if 8 + length + end != size:
        raise FormatError(f"{size} bytes, expected {8 + length + end}: truncated, or not its file")
    return stored, {}


def _stored(path: Path, entry: dict[str, Any], start: int) -> Stored:
    if set(entry) != {"dtype", "shape", "data_offsets"} or not isinstance(entry["shape"], list):
        raise FormatError(f"is described by {sorted(entry)}")
    if (dtype := DTYPES.get(entry["dtype"])) is None:
        raise FormatError(f"holds {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    return Stored(tuple(entry["shape"]), dtype, partial(part, path, start))
