"""What a machine knows of a commit of a Hub repo: the client's cache, and the list of its files.

The client caches the files that were asked for and no list, so a config that an SAE may have is
not known to be missing only because it is not there. The list is kept here, once the Hub gave it.

    HF_HUB_CACHE/models--ORG--REPO/{refs/REVISION, snapshots/COMMIT/…, .no_exist/COMMIT/…}
    HF_HOME/saert/listings/models--ORG--REPO/COMMIT.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from saert.hub.sources.folder import Folder
from saert.hub.sources.http import own_cache, write_whole

COMMIT = re.compile(r"[0-9a-f]{40}")


class Snapshot(Folder):
    """The cached files of one commit.

    Args:
        root: models--ORG--REPO/snapshots/COMMIT.
        alone: why the files there may not be all; None where a caller says that they are.
    """

    def __init__(self, root: Path, alone: str | None = None) -> None:
        repo = root.parent.parent.name.removeprefix("models--")
        super().__init__(root, repo.replace("--", "/", 1))
        self.commit = root.name
        self.partial = alone

    def lacks(self, name: str) -> bool:
        """Whether the kept list is without it, or the client marked that the Hub is."""
        kept = kept_names(self.name, self.root.name)
        if kept is not None:
            return name not in kept
        return (self.root.parents[1] / ".no_exist" / self.root.name / name).is_file()


def snapshot_above(place: Path) -> Path | None:
    """The snapshot of the client's cache that a place lies in, if it does."""
    for root in (place, *place.parents):
        in_repo = re.fullmatch(r"models--.+?--.+", root.parent.parent.name)
        if in_repo and root.parent.name == "snapshots" and COMMIT.fullmatch(root.name):
            return root
    return None


def kept_names(repo: str, commit: str) -> list[str] | None:
    """The files of a commit, if the Hub gave their list once."""
    with suppress(OSError, ValueError, RecursionError):
        names = json.loads(_listing(repo, commit).read_text(encoding="utf-8"))
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            return names
    return None


def keep_names(repo: str, commit: str, names: Iterable[str]) -> None:
    with suppress(OSError):  # a cache that cannot be written to is no reason to fail
        write_whole(_listing(repo, commit), json.dumps(sorted(names)))


def cache_folder(repo: str) -> str:
    return "models--" + repo.replace("/", "--")


def _listing(repo: str, commit: str) -> Path:
    return own_cache() / "listings" / cache_folder(repo) / f"{commit}.json"
