"""`.npz`: a zip archive of `.npy` files, each a short text header and an array. No pickle."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch

from saert.hub.errors import FormatError
from saert.hub.files.stored import Stored, Stream
from saert.hub.files.zips import open_zip
from saert.hub.sources.folder import file_size

DTYPES = {
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64,
    "<i4": torch.int32, "<i2": torch.int16, "|i1": torch.int8, "|u1": torch.uint8,
}  # fmt: skip
HEADER = re.compile(
    r"\{ *'descr': *(?P<descr>'[^']*'|\[.*\]) *, *'fortran_order': *(?P<fortran>True|False) *, *"
    r"'shape': *\((?P<shape>[0-9, ]*)\) *,? *\} *\n?"
)
MOST_HEADER = 4096
# Weights hardly shrink; a dictionary with many dead latents may
MOST_GROWTH, ALWAYS_ALLOWED = 32, 64 << 20


def read_npz(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The arrays of a file, compressed or not; nothing beside them.

    Raises FormatError for members that are no little-endian arrays of numbers, whose size is not
    what their header says, or that unpack to more than 32 times the file (and 64 MB).
    """
    stored: dict[str, Stored] = {}
    with open_zip(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
        if total > max(ALWAYS_ALLOWED, MOST_GROWTH * file_size(path)):
            raise FormatError(f"unpacks to {total} bytes, more than {MOST_GROWTH} times its size")
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or info.flag_bits & 1:
                raise FormatError(f"member {info.filename!r}, expected arrays (.npy), unencrypted")
            try:
                with archive.open(info) as member:
                    stored[name] = _stored(path, info, member)
            except FormatError as error:
                raise FormatError(f"{name} {error}") from None
    return stored, {}


def _stored(path: Path, info: zipfile.ZipInfo, member: IO[bytes]) -> Stored:
    shape, dtype, fortran = _header(member)
    start = member.tell()
    one = Stored(shape, dtype, partial(_array, path, info, start), fortran and len(shape) > 1)
    if info.file_size != start + one.num_bytes:
        raise FormatError(f"has {info.file_size - start} bytes, expected {one.num_bytes}")
    return one


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], torch.dtype, bool]:
    """numpy.lib.format's header, matched as text: no literal of a stranger is evaluated."""
    magic = member.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise FormatError(f"starts with {magic!r}, expected a .npy file")
    length = int.from_bytes(member.read(2 if magic[6] == 1 else 4), "little")
    if length > MOST_HEADER:
        raise FormatError(f"has a header of {length} bytes, expected at most {MOST_HEADER}")
    text = member.read(length).decode("latin-1")
    if (match := HEADER.fullmatch(text)) is None:
        raise FormatError(f"has the header {text[:100]!r}, expected descr, fortran_order, shape")
    if (dtype := DTYPES.get(match["descr"].strip("'"))) is None:
        raise FormatError(f"holds {match['descr'][:50]}, expected one of {', '.join(DTYPES)}")
    shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
    return shape, dtype, match["fortran"] == "True"


@contextmanager
def _array(path: Path, info: zipfile.ZipInfo, start: int) -> Iterator[Stream]:
    with open_zip(path) as archive, archive.open(info) as member:
        member.read(start)
        yield cast(Stream, member)
