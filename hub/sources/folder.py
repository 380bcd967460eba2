"""A tree of files: what a source is, and the local kind."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Protocol

from saert.hub.errors import FormatError, reading

MOST_FILES = 200_000


class Source(Protocol):
    """A tree of files. `name` is what messages call it."""

    @property
    def name(self) -> str: ...

    @property
    def commit(self) -> str | None:
        """The commit that the files come from; None for a local folder."""
        ...

    @property
    def partial(self) -> str | None:
        """After `names`: why its list may not be whole; None if it is."""
        ...

    def names(self) -> list[str]:
        """Every file below the source, as a relative POSIX path."""
        ...

    def lacks(self, name: str) -> bool:
        """Whether a file that is not listed is known not to be there."""
        ...

    def fetch(self, name: str) -> Path:
        """A file on this machine."""
        ...


class Folder:
    """A local folder, laid out as a repo."""

    commit: str | None = None
    partial: str | None = None

    def __init__(self, root: Path, name: str | None = None) -> None:
        self.root, self.name = root, name or root.as_posix()

    def names(self) -> list[str]:
        """Hidden folders and links to folders are left out."""
        found: list[str] = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            below = PurePosixPath(Path(folder).relative_to(self.root).as_posix())
            found += [str(below / one) for one in files]
            if len(found) > MOST_FILES:
                raise FormatError(
                    f"{self.name}: more than {MOST_FILES} files; name a folder nearer to the SAE"
                )
        return found

    def lacks(self, name: str) -> bool:
        return name not in self.names()

    def fetch(self, name: str) -> Path:
        """A file below the root, links resolved. Raises FormatError for one that leads outside."""
        path = self.root / safe_path(name)
        try:
            root, target = self.root.resolve(), path.resolve()
        except (OSError, RuntimeError) as error:  # a ring of links
            raise FormatError(f"{self.name}/{name}: {error}") from error
        if not any(target.is_relative_to(place) for place in (root, *_blobs(root))):
            raise FormatError(
                f"{self.name}/{name}: a link to {target}, expected a file inside the folder"
            )
        file_size(path)
        return path


def _blobs(root: Path) -> list[Path]:
    """Where a Hub cache keeps what it shows in <repo>/snapshots/<commit>/: <repo>/blobs."""
    return [
        place.parents[1] / "blobs"
        for place in (root, *root.parents)
        if place.parent.name == "snapshots" and (place.parents[1] / "blobs").is_dir()
    ]


def file_size(path: Path) -> int:
    """Size of a regular file in bytes; FormatError for a folder, a pipe or a device."""
    with reading(path, "a regular file"):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path.name}: not a regular file, which an SAE's files are")
    return status.st_size


def safe_path(path: str) -> str:
    """A path that stays inside its source, in POSIX form. Raises FormatError for any other."""
    parts = PurePosixPath(path)
    unsafe = parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path
    if unsafe or not path.strip():
        raise FormatError(f"path {path!r}: expected a file or folder inside the source")
    return parts.as_posix()
