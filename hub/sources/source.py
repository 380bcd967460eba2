"""Where an SAE comes from: the package, a local folder or file, a Hub repo, a URL.

Names first, each file when it is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from saert.hub import bundled
from saert.hub.detect import FAMILIES
from saert.hub.sources.address import WEIGHTS, file_url, hub_address, is_url, shown
from saert.hub.sources.folder import Folder, Source, safe_path
from saert.hub.sources.repo import Repo
from saert.hub.sources.snapshot import Snapshot, snapshot_above
from saert.hub.sources.web import WebFile, configs_beside


def open_source(
    source: str | Path, revision: str | None = None, path: str | None = None
) -> tuple[Source, str | None]:
    """The source a name means, and the path inside it: what the name says of it, then `path`.

    Asks the network nothing.

    Raises:
        FileNotFoundError: a local path that is not there, or a name that means nothing.
        ValueError: a revision of something that has none, or another one than the name says; an
            address that cannot be an SAE's. FormatError: a path that leaves the source.
    """
    path = None if path is None else safe_path(path)
    text = str(source)
    if isinstance(source, str) and is_url(source):
        return _at_url(source, revision, path)
    if (here := _local(source, path)) is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for Hub repos; {shown(text)} is local")
        return here
    looks_local = isinstance(source, Path) or _looks_local(text)
    if looks_local or (address := hub_address(text)) is None:
        raise FileNotFoundError(_nothing(text, looks_local))
    return Repo(address.repo, _one(address.revision, revision)), _join(address.path, path)


def _at_url(url: str, revision: str | None, path: str | None) -> tuple[Source, str | None]:
    if (address := hub_address(url)) is not None:
        return Repo(address.repo, _one(address.revision, revision)), _join(address.path, path)
    file = WebFile(
        file_url(url if path is None else f"{url.rstrip('/')}/{path}"), FAMILIES, revision
    )
    return file, file.weights


def _local(source: str | Path, path: str | None) -> tuple[Source, str | None] | None:
    """A place that exists on this machine, `folder` or `folder:path`; or the package's own SAEs."""
    head, colon, inner = str(source).partition(":")
    if head == bundled.NAME and isinstance(source, str):
        return Folder(bundled.SAES, bundled.NAME), _join(inner or None, path)
    if (place := _existing(str(source))) is not None:
        return _folder(place, path) if place.is_dir() else _file(place, path)
    place = _existing(head) if isinstance(source, str) and colon and inner and head else None
    if place is not None and place.is_dir():
        return _folder(place, _join(safe_path(inner), path))
    return None


def is_here(text: str) -> bool:
    """Whether a spelling names what exists on this machine, `folder:path` to the last part."""
    head, _, inner = text.partition(":")
    return _existing(text) is not None or (
        bool(inner) and not inner.startswith("/") and _existing(f"{head}/{inner}") is not None
    )


def _existing(text: str) -> Path | None:
    try:
        place = Path(text).expanduser()
        return place if text and place.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, nobody's home, a NUL
        return None


def _folder(place: Path, path: str | None) -> tuple[Source, str | None]:
    """A local folder: what lies there is all. In the Hub's cache it knows its repo and commit."""
    whole = place.absolute()
    if (root := snapshot_above(whole)) is None:
        return Folder(place), path
    below = whole.relative_to(root).as_posix()
    return Snapshot(root), _join(None if below == "." else below, path)


def _file(place: Path, path: str | None) -> tuple[Source, str | None]:
    """A weights file; its configs lie beside it or, in some layouts, in the folder above."""
    whole = place.absolute()
    if (root := snapshot_above(whole.parent)) is not None:
        source: Folder = Snapshot(root, "one file of it was named")
    else:
        source = Beside(whole)
    return source, _join(whole.relative_to(source.root).as_posix(), path)


class Beside(Folder):
    """What lies beside a file, and in the folder above it; nothing further down."""

    def __init__(self, file: Path) -> None:
        super().__init__(file.parent.parent)
        self.file = file

    def names(self) -> list[str]:
        """Of a folder that may not be listed, the files that a family would look for."""
        found = {self.file}
        for folder in (self.file.parent, self.root):
            try:
                found.update(one for one in folder.iterdir() if one.is_file())
            except PermissionError:
                own = self.file.relative_to(self.root).as_posix()
                wanted = [self.root / one for one in configs_beside(own, FAMILIES)]
                found.update(one for one in wanted if one.parent == folder and one.is_file())
        return [one.relative_to(self.root).as_posix() for one in found]


def _looks_local(text: str) -> bool:
    """Whether a name that is not there can only have meant a place on this machine."""
    head = text.partition(":")[0].partition("@")[0]
    a_path = head.startswith((".", "/", "~")) or "\\" in head or head.count("/") > 1
    return a_path or head.endswith(("/", *WEIGHTS))


def _nothing(text: str, looks_local: bool) -> str:
    """What to say of a name that is neither here nor on the Hub."""
    name = shown(text)
    name = name if len(name) < 300 else f"{name[:300]}…"
    repo = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/([^:]+)", name)
    hint = f"; a folder of a Hub repo is {repo[1]}:{repo[2]}" if repo else ""
    if looks_local:
        return f"{name}: no such folder or file{hint}"
    return (
        f"{name}: no folder or file of that name, and no Hub repo, ORG/REPO[@REVISION][:PATH]; "
        f"the package's own SAEs are {bundled.NAME!r}"
    )


def _one(said: str | None, given: str | None) -> str | None:
    if said is not None and given is not None and said != given:
        raise ValueError(f"revision={given!r}, but the source itself says {said!r}")
    return given or said


def _join(inner: str | None, path: str | None) -> str | None:
    return f"{inner}/{path}" if inner and path else inner or path
