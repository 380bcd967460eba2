"""A repo of the Hub, and one commit to it: only what differs, or nothing."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from saert.hub.formats.sparsify import TRAINING as MODEL_FILE
from saert.hub.publishing import plots as card_plots
from saert.hub.publishing.card import render
from saert.hub.publishing.entry import Entry
from saert.hub.publishing.merge import (
    Index,
    Merged,
    Tree,
    left_over,
    merge,
    model_file,
    read_index,
)
from saert.hub.publishing.stage import CARD, INDEX, PLOTS, Staged

TRIES = 10  # commits, where others commit at the same time
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0  # seconds between them
MOVED = 412  # the Hub's answer then

Files = dict[str, Path | bytes]


@dataclass(frozen=True)
class Pushed:
    """The commit that holds everything, what was written and removed for it, what the repo says of
    its SAEs now, which of them somebody else replaced, and the card."""

    commit: str
    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    entries: dict[str, Entry]
    stale: tuple[str, ...]
    card: str


@dataclass(frozen=True)
class Remote:
    """A branch of a repo (None: the main one), and how to commit to it."""

    api: HfApi
    repo_id: str
    branch: str | None = None
    tags: tuple[str, ...] = ()
    license: str | None = None
    create_pr: bool = False

    def push(self, staged: Staged, message: str, private: bool) -> Pushed:
        """One commit with all that differs, in a repo that is made if missing.

        Raises ValueError for a public repo that was to be private, a branch that is a tag, a tag
        that names another commit, several base models; all of it before anything is sent.
        """
        self._open(private)
        for attempt in range(TRIES):
            if attempt:
                time.sleep(random.uniform(0.5, 1) * min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
            try:
                return self._push(staged, message)
            except HfHubHTTPError as error:
                if error.response.status_code != MOVED:
                    raise
        raise ConnectionError(
            f"{self.repo_id}: others committed to it during each of {TRIES} tries; publish again"
        )

    def _open(self, private: bool) -> None:
        try:
            info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:  # None: what its owner has chosen for new repos
            self.api.create_repo(self.repo_id, private=True if private else None, exist_ok=True)
            info = self.api.model_info(self.repo_id)
        if private and not info.private:
            raise ValueError(
                f"{self.repo_id} is public and was to be private; change its visibility on the "
                "Hub first, or publish without private"
            )
        if self.branch is not None:
            refs = self.api.list_repo_refs(self.repo_id)
            if self.branch in [tag.name for tag in refs.tags]:
                raise ValueError(f"revision {self.branch!r} is a tag, expected a branch")
            if self.branch not in [branch.name for branch in refs.branches]:
                self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def _push(self, staged: Staged, message: str) -> Pushed:
        head = str(self.api.model_info(self.repo_id, revision=self.branch).sha)
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=head)
        there = {one.path: one for one in tree if isinstance(one, RepoFile)}
        text = self._fetch(INDEX, head) if INDEX in there else None
        before = Index() if text is None else read_index(text, self.repo_id)
        merged = merge(staged.entries, before.saes, there)
        root, kept = self._root(merged, before, head, there)
        wanted: Files = {**staged.files, **root}
        changed = sorted(name for name in wanted if _differs(wanted[name], there.get(name)))
        needed = {*wanted, *kept}
        gone = tuple(sorted(left_over(staged.entries, merged, before, needed, there)))
        new_tags = self._new_tags(head, moves=bool(changed or gone))
        commit, url = head, None
        if changed or gone:
            additions = [CommitOperationAdd(name, wanted[name]) for name in changed]
            deletions = [CommitOperationDelete(name) for name in gone]
            made = self.api.create_commit(
                self.repo_id,
                [*additions, *deletions],
                commit_message=message,
                revision=self.branch,
                parent_commit=head,
                create_pr=self.create_pr,
            )
            commit, url = str(made.oid), made.pr_url
        for tag in new_tags:
            self.api.create_tag(self.repo_id, tag=tag, revision=commit)
        url = url or f"{self.api.endpoint}/{self.repo_id}/tree/{commit}"
        card = root[CARD].decode()
        return Pushed(commit, url, tuple(changed), gone, merged.entries, merged.stale, card)

    def _root(
        self, merged: Merged, before: Index, head: str, there: Tree
    ) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """The root's files, and the pictures of ours that still hold."""
        if len(models := sorted({entry.base_model for entry in merged.entries.values()})) > 1:
            raise ValueError(
                f"{self.repo_id} would hold SAEs of several models, {models}: publish each into "
                "its own repo"
            )
        ours = tuple(name for name in before.plots if name in there)
        kept = ours if merged.entries == before.saes else ()
        config = self._fetch(MODEL_FILE, head) if MODEL_FILE in there else None
        root = root_files(
            merged.entries,
            self.repo_id,
            card=self._fetch(CARD, head) if CARD in there else "",
            previous=before.saes,
            kept=kept,
            taken={name for name in PLOTS if name in there and name not in ours},
            license=self.license,
            revision=self.branch,
        )
        return root | model_file(merged.entries, before.saes, config, self.repo_id), kept

    def _fetch(self, name: str, commit: str) -> str:
        with TemporaryDirectory() as cache:
            path = hf_hub_download(
                self.repo_id, name, revision=commit, cache_dir=cache, token=self.api.token
            )
            return _decoded(Path(path).read_bytes())

    def _new_tags(self, head: str, moves: bool) -> list[str]:
        """Those that have to be made. Raises ValueError if one names another commit."""
        if not self.tags:
            return []
        refs = self.api.list_repo_refs(self.repo_id)
        at = {tag.name: tag.target_commit for tag in refs.tags}
        for tag in self.tags:
            if tag in [branch.name for branch in refs.branches]:
                raise ValueError(f"{self.repo_id}: {tag!r} is a branch; choose another tag")
            if tag in at and (moves or at[tag] != head):
                raise ValueError(
                    f"{self.repo_id}: tag {tag!r} names commit {at[tag][:8]}, which holds "
                    "something else; nothing was published. Choose another tag, or delete that one"
                )
        return [tag for tag in self.tags if tag not in at]


def root_files(
    entries: Mapping[str, Entry],
    repo_id: str,
    *,
    card: str = "",
    previous: Mapping[str, Entry] | None = None,
    kept: Collection[str] = (),
    taken: Collection[str] = (),
    license: str | None = None,
    revision: str | None = None,
) -> dict[str, bytes]:
    """Card, index, and pictures unless some are `kept`, for all SAEs of a repo.

    Args:
        card, previous: the README.md and the SAEs that are there.
        kept: pictures that still hold.
        taken: names of pictures that are somebody else's.
    """
    entries = {path: entries[path] for path in sorted(entries, key=natural)}
    drawn = {} if kept else card_plots.draw(entries)
    plots = {name: content for name, content in drawn.items() if name not in taken}
    shown = tuple(name for name in PLOTS if name in plots or name in kept)
    options: dict[str, Any] = {"license": license, "revision": revision, "plots": shown}
    text = render(entries, repo_id, before=card, previous=previous or {}, **options)
    return {CARD: text.encode(), INDEX: Index(entries, shown).to_json().encode(), **plots}


def natural(path: str) -> list[tuple[int, str]]:
    """The order of paths: resid_post.2 comes before resid_post.10."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _decoded(content: bytes) -> str:
    """Text of people who need not use UTF-8, its lines ended as ours."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n")


def _differs(file: Path | bytes, there: RepoFile | None) -> bool:
    """Whether a file of the repo is another than ours, or missing."""
    if there is None:
        return True
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if size != there.size:
        return True
    if there.lfs is not None:
        return _hash(hashlib.sha256(), file) != there.lfs.sha256
    return _hash(hashlib.sha1(b"blob %d\0" % size), file) != there.blob_id  # as git names it


def _hash(found: Any, file: Path | bytes) -> str:
    if isinstance(file, bytes):
        found.update(file)
    else:
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                found.update(part)
    return str(found.hexdigest())
