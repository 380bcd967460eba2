"""Names that the Hub, git and other people's file systems take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAIN = "main"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
REF = re.compile(r"[A-Za-z0-9_][\w./-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PATH = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)
DEVICES = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # on Windows
LONGEST = 200


def check_repo(repo_id: str, revision: str | None, tags: Sequence[str], create_pr: bool) -> None:
    """Raise ValueError for names that the Hub would refuse, or that contradict each other."""
    if not REPO.fullmatch(repo_id) or len(repo_id) > 96 or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(
            f"repo_id {repo_id!r}: expected 'USER/NAME' of letters, digits, '-', '_' and '.', at "
            "most 96 characters, without '--' and '..'"
        )
    if isinstance(tags, str):
        raise ValueError(f"tags is {tags!r}, expected a list, [{tags!r}]")
    for name in (*tags, *(() if revision is None else (revision,))):
        parts = name.split("/")
        odd = ".." in name or any(not one or one.endswith((".", ".lock")) for one in parts)
        if not REF.fullmatch(name) or odd or COMMIT.fullmatch(name):
            raise ValueError(
                f"{name!r}: expected a name for a branch or tag, of letters, digits and '._/-', "
                "no part of it empty or ending in '.' or '.lock'"
            )
    if len({*tags}) < len(tags):
        raise ValueError(f"tags {list(tags)}: one of them twice")
    if (branch := revision or MAIN) in tags:
        raise ValueError(f"tag {branch!r} is called as the branch; choose another name")
    if create_pr and (tags or revision not in (None, MAIN)):
        raise ValueError("a pull request goes to main, and its commit gets no tags")


def check_path(path: str, files: Iterable[str]) -> None:
    """Raise ValueError for an SAE's folder that not every system can hold.

    `files`: what a published repo calls its files.
    """
    parts = path.split("/")
    odd = any(one.endswith((".", ".lock")) or DEVICES.fullmatch(one) for one in parts)
    taken = {name.lower() for name in files} & {one.lower() for one in parts}
    if not PATH.fullmatch(path) or len(path) > LONGEST or odd or taken:
        raise ValueError(
            f"{path[:LONGEST]!r}: expected a path of letters, digits, '_', '-' and '.', at most "
            f"{LONGEST}, not ending in '.' or '.lock', with no file's name in it; name the SAE "
            "with a dict, {'resid_post.6': sae}"
        )
