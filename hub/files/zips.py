"""Opening a zip archive that a stranger wrote."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from saert.hub.errors import FormatError

MOST_AT_ONCE = 4 << 20  # of a list of members: zipfile reads the whole list


class _Bounded(FileIO):
    """A file that hands out a few megabytes at once, whatever the archive says it needs."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = MOST_AT_ONCE
        if size > MOST_AT_ONCE:
            raise FormatError(f"{size} bytes at once, expected at most {MOST_AT_ONCE}")
        return super().read(size) or b""


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive whose list of members is short and names each of them once."""
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
        twice = [name for name, count in Counter(archive.namelist()).items() if count > 1]
        if twice:
            raise FormatError(f"several members {twice[0]!r}, expected one")
        yield archive
