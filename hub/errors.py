"""What a checkpoint that cannot be read raises."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FormatError(ValueError):
    """A checkpoint that cannot be read without guessing; says what was found and expected."""


CORRUPT = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
    NotImplementedError, RecursionError, SyntaxError, struct.error, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
"""What the standard library raises on bytes that nobody's writer wrote."""


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever malformed bytes raise into a FormatError: file, what was found, what expected.

    A file that is missing or may not be read stays what it is.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, FormatError):
        raise
    except CORRUPT as error:
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise FormatError(f"{path.name}: expected {expected}; found {found[:300]}") from error


class Unrecognised(FormatError):
    """A file that is named like an SAE's weights, and holds something else."""
