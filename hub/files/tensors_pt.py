"""`.pt`, `.pth`, `.bin`: what `torch.save` writes, as a zip archive or as it did before 2020.

The pickle inside is interpreted, never run (`pickles`), and the tensors are read from their places
in the file when they are asked for.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from saert.hub.errors import FormatError
from saert.hub.files.parse import check_plain
from saert.hub.files.pickles import MOST_BYTES, Program, Storage, Strided, interpret
from saert.hub.files.stored import Stored, part
from saert.hub.files.zips import open_zip
from saert.hub.sources.folder import file_size

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_pt(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a saved dict, and what else it holds.

    Raises FormatError for anything but a dict of tensors and plain values, for a pickle that would
    run code, and for tensors that reach beyond their storage or the file.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    program, places = (_zipped if zipped else _legacy)(path)
    if not isinstance(program.value, Mapping):
        raise FormatError(f"holds a {type(program.value).__name__}, expected a dict of tensors")
    stored: dict[str, Stored] = {}
    extras: dict[str, Any] = {}
    for key, value in program.value.items():
        if not isinstance(key, str):
            raise FormatError(f"a {type(key).__name__} as a key, expected names")
        if not isinstance(value, Strided):
            extras[key] = value
            continue
        try:
            stored[key] = _stored(path, value, places[value.storage.key])
        except FormatError as error:
            raise FormatError(f"{key} {error}") from None
    check_plain(extras, path.name)
    return stored, extras


def _stored(path: Path, found: Strided, place: int) -> Stored:
    """A tensor whose storage starts at a byte of the file."""
    shape, stride, itemsize = found.shape, found.stride, found.dtype.itemsize
    one = Stored(shape, found.dtype, partial(part, path, place + found.offset * itemsize))
    size = found.storage.numel * found.storage.dtype.itemsize
    last = found.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if one.num_bytes > size or (last + 1) * itemsize > size:
        raise FormatError(
            f"is {list(shape)} with strides {list(stride)} from element {found.offset}, expected "
            f"to lie within its storage of {size} bytes"
        )
    if _dense(shape, stride):
        return one
    if _dense(shape[::-1], stride[::-1]):
        return Stored(shape, found.dtype, one.open, column_major=True)
    return Stored(shape, found.dtype, partial(_gathered, path, found, place))


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements lie one after the other, row after row."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _gathered(path: Path, found: Strided, place: int) -> BytesIO:
    """The bytes of a tensor that is a slice of a larger one: that one is read as a whole."""
    size = found.storage.numel * found.storage.dtype.itemsize
    with part(path, place) as file:
        content = bytearray(file.read(size))
    flat = torch.frombuffer(content, dtype=found.dtype, count=size // found.dtype.itemsize)
    rows = flat.as_strided(found.shape, found.stride, found.offset).contiguous()
    return BytesIO(rows.reshape(-1).view(torch.uint8).numpy().data)


def _zipped(path: Path) -> tuple[Program, dict[str, int]]:
    with open_zip(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError(f"an archive of {sorted(members)[:5]}, expected one data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in members:
            raise FormatError("a TorchScript module, expected a saved dict of tensors")
        order = members.get(f"{folder}byteorder")
        if order is not None and _small(archive, order, 16) != b"little":
            raise FormatError("big-endian numbers, expected little-endian ones")
        program = interpret(_small(archive, members[pickles[0]], MOST_BYTES))
        places = {}
        for storage in program.storages.values():
            info = members.get(f"{folder}data/{storage.key}")
            if info is None:
                raise FormatError(f"no record data/{storage.key}, which a tensor needs")
            places[storage.key] = _place(path, info, storage)
    return program, places


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    if info.file_size > limit:
        raise FormatError(f"{info.filename} of {info.file_size} bytes, expected at most {limit}")
    if info.flag_bits & 1:
        raise FormatError(f"{info.filename} is encrypted")
    with archive.open(info) as member:
        return member.read(limit)


def _place(path: Path, info: zipfile.ZipInfo, storage: Storage) -> int:
    """Where a record starts: behind a header of its own, whose length only it knows."""
    size = storage.numel * storage.dtype.itemsize
    with part(path, info.header_offset) as file:
        header = file.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = info.header_offset + len(header) + name + extra
    plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    if not plain or header[:4] != b"PK\x03\x04":
        raise FormatError(f"{info.filename} is compressed or encrypted, expected a plain record")
    if info.file_size < size or start + size > file_size(path):
        raise FormatError(f"{info.filename} has {info.file_size} bytes, expected {size}")
    return start


def _legacy(path: Path) -> tuple[Program, dict[str, int]]:
    """Five pickles (magic number, protocol, system, the dict, the order of storages), then them."""
    size = file_size(path)
    with open(path, "rb") as file:
        start = file.read(3 * MOST_BYTES)
        end, programs = 0, list[Program]()
        for _ in range(5):
            programs.append(interpret(start[end : end + MOST_BYTES]))
            end += programs[-1].end
            if programs[0].value != LEGACY_MAGIC:
                raise FormatError("neither an archive nor a legacy file of torch.save")
        _, protocol, system, program, order = programs
        if protocol.value != LEGACY_PROTOCOL or system.value.get("little_endian") is not True:
            raise FormatError("another protocol or byte order than torch.save's")
        places = {}
        for key in order.value:
            storage = program.storages[key]
            file.seek(end)
            count = int.from_bytes(file.read(8), "little")
            places[storage.key] = end + 8
            end += 8 + count * storage.dtype.itemsize
            if count != storage.numel or end > size:
                raise FormatError(
                    f"storage {key} has {count} elements, expected {storage.numel} within the file"
                )
    return program, places
