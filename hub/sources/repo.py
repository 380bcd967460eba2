"""A Hub repo at one commit, through huggingface_hub's own client and cache.

A branch or tag is looked up once; every file is then asked for by that commit, so a branch that
moves meanwhile changes nothing. What is cached loads when nobody answers: from the snapshot that
the revision named last. A commit's list of files is kept, because it can never change: a pinned
commit that was loaded once is loaded again without a request, and the list offline is whole.
Where no list was kept, `partial` says so.

The token is huggingface_hub's business (HF_TOKEN, `hf auth login`) and never passes through here.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from saert.hub.files.parse import MOST_BYTES
from saert.hub.sources.folder import safe_path
from saert.hub.sources.http import NoAnswer, Trouble, answered, unreachable, write_whole
from saert.hub.sources.snapshot import COMMIT, Snapshot, cache_folder, keep_names, kept_names

CONFIGS = (".json", ".yaml", ".yml")
TIMEOUT = 15.0
MOST_SIBLINGS = 50_000

logger = logging.getLogger(__name__)


class Repo:
    """Args:
    name: Hub id, ORG/REPO.
    revision: branch, tag or full commit hash.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, safe_path(revision or "main")
        self._found: ModelInfo | None = None
        self._reason: str | None = None  # why the Hub was not asked again
        self.partial: str | None = None

    def __repr__(self) -> str:
        return f"Repo({self.name!r}, {self.revision!r})"

    @cached_property
    def commit(self) -> str:
        """The commit that the revision names now or, if nobody answers, named when it was cached.

        Raises LocalEntryNotFoundError if nobody answers and nothing is cached; otherwise what the
        Hub answers (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, …).
        """
        if COMMIT.fullmatch(self.revision) and kept_names(self.name, self.revision) is not None:
            return self.revision
        try:
            return str(self._ask().sha)
        except Trouble as error:
            reason, commit = unreachable(error), self._cached_commit()
            if reason is None or (commit is None and isinstance(error, HfHubHTTPError)):
                raise
            if commit is None:
                raise self._missing(f"revision {self.revision!r}", reason) from error
            if not constants.is_offline_mode():
                logger.warning(
                    "%s: %s; loading commit %s from the cache", self.name, reason, commit
                )
            self._reason = reason
            return commit

    def names(self) -> list[str]:
        """Every file of the commit; without an answer, and without the list, those cached."""
        if (kept := kept_names(self.name, self.commit)) is not None:
            return kept
        self.partial = self._reason
        if self._reason is not None:
            return self._snapshot.names()
        try:
            names = [one.rfilename for one in self._ask().siblings or ()]
            if len(names) >= MOST_SIBLINGS:  # the Hub shortens longer lists
                names = answered(lambda: HfApi().list_repo_files(self.name, revision=self.commit))
        except Trouble as error:
            self.partial = self._reason = unreachable(error)
            if self._reason is None or not (names := self._snapshot.names()):
                if self._reason is None or isinstance(error, HfHubHTTPError):
                    raise
                raise self._missing(f"commit {self.commit}", self._reason) from error
            return names
        keep_names(self.name, self.commit, names)
        return names

    def lacks(self, name: str) -> bool:
        """Whether a file that is not among those cached is known not to be there."""
        return self.partial is None or self._snapshot.lacks(name)

    def fetch(self, name: str) -> Path:
        """A file of the commit, from the cache or downloaded into it, whole and as declared.

        Raises:
            LocalEntryNotFoundError: not cached, and nobody answers.
            OSError: too large for the disk or for a config; cut off; not what the Hub declares.
                Nothing of it is kept.
        """
        path = self._cached(safe_path(name)) or self._download(name)
        if self._found is not None and self.revision != self.commit:
            with suppress(OSError):  # as the client does when it is asked for a branch
                self._remember()
        return path

    def to_fetch(self, name: str) -> int | None:
        """Bytes that `fetch` would download: 0 if it is cached, None if the Hub does not say."""
        if self._cached(safe_path(name)) is not None:
            return 0
        declared = self._declared.get(name)
        return None if declared is None else declared.size

    def _ask(self) -> ModelInfo:
        """The Hub's answer on the revision, asked for once."""
        if self._found is None:
            found = answered(
                lambda: HfApi().model_info(self.name, revision=self.revision, timeout=TIMEOUT)
            )
            if COMMIT.fullmatch(found.sha or "") is None:
                raise NoAnswer(f"the server answers with the commit {found.sha!r}, as no Hub does")
            self._found = found
        return self._found

    @cached_property
    def _declared(self) -> dict[str, RepoSibling]:
        """Size and hash of every file, asked for when the first one has to be downloaded."""
        info = answered(
            lambda: HfApi().model_info(
                self.name, revision=self.commit, files_metadata=True, timeout=TIMEOUT
            )
        )
        return {one.rfilename: one for one in info.siblings or ()}

    def _download(self, name: str) -> Path:
        if self._reason is not None:
            raise self._missing(name, self._reason)
        try:
            declared = self._declared.get(name, RepoSibling(name))
            self._check_size(declared)
            path = Path(hf_hub_download(self.name, name, revision=self.commit))
        except HfHubHTTPError:
            raise
        except Trouble as error:
            raise self._missing(name, unreachable(error)) from error
        except LocalEntryNotFoundError as error:  # the client's "an error happened"
            raise self._missing(name, unreachable(error.__cause__) or str(error)) from error
        except OSError as error:
            if "Consistency check failed" not in str(error):
                raise
            size = declared.size
            raise OSError(
                f"{self.name}: {name} came with another size than the {size} bytes that the Hub "
                "declares; nothing of it was kept, try again"
            ) from error
        if (wrong := difference(path, declared)) is not None:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise OSError(f"{self.name}: {name} {wrong}; it was deleted, try again")
        return path

    def _check_size(self, declared: RepoSibling) -> None:
        size, name = declared.size or 0, declared.rfilename
        if name.endswith(CONFIGS) and size > MOST_BYTES:
            raise OSError(
                f"{self.name}: {name} has {size} bytes, expected a config of at most {MOST_BYTES}"
            )
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(cache).free):
            raise OSError(
                f"{self.name}: {name} has {size / 1e9:.1f} GB, but {cache} has room for "
                f"{free / 1e9:.1f} GB; free some, or set HF_HOME to a larger disk"
            )

    def _missing(self, what: str, reason: str | None) -> LocalEntryNotFoundError:
        return LocalEntryNotFoundError(f"{self.name}: {what} is not cached, and {reason}")

    # -- the client's cache ------------------------------------------------------------------------

    @property
    def _cache(self) -> Path:
        return Path(constants.HF_HUB_CACHE) / cache_folder(self.name)

    @property
    def _snapshot(self) -> Snapshot:
        return Snapshot(self._cache / "snapshots" / self.commit)

    def _cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    @property
    def _ref(self) -> Path:
        return self._cache / "refs" / self.revision

    def _cached_commit(self) -> str | None:
        """What the revision was last; a commit that is cached is its own."""
        with suppress(OSError):
            commit = self._ref.read_text(encoding="utf-8").strip()
            return commit if COMMIT.fullmatch(commit) else None
        is_cached = (self._cache / "snapshots" / self.revision).is_dir()
        return self.revision if COMMIT.fullmatch(self.revision) and is_cached else None

    def _remember(self) -> None:
        if self._cached_commit() != self.commit:
            write_whole(self._ref, self.commit)


def difference(path: Path, declared: RepoSibling) -> str | None:
    """How a fresh download differs from what the Hub declares, in words; None if it does not.

    The client compares sizes only. Hashing runs at half a gigabyte a second, once per download.
    """
    size = path.stat().st_size
    if declared.size is not None and size != declared.size:
        return f"came with {size} bytes, but the Hub declares {declared.size}"
    blob = path.resolve().name  # the cache calls a large file by the sha256 that came with it
    sha256 = declared.lfs.sha256 if declared.lfs else blob if len(blob) == 64 else None
    with path.open("rb") as file:
        if sha256 is not None:
            declared_hash, found = sha256, hashlib.file_digest(file, "sha256").hexdigest()
        elif declared.blob_id is not None:
            declared_hash = declared.blob_id
            found = hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest()
        else:
            return None
    return None if found == declared_hash else f"has the hash {found}, declared {declared_hash}"
