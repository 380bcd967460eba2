"""load: an SAE from the Hugging Face Hub, a local folder, or the package itself."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from saert.hub import bundled
from saert.hub.format import FormatError, read
from saert.hub.formats.saelens import CONFIG, WEIGHTS
from saert.runtime import set_loader
from saert.sae import SAE


def load(
    source: str | Path,
    path: str | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> SAE:
    """An SAE, ready to attach.

    Args:
        source: a Hub repo id, a local folder laid out as one, or "bundled".
        path: the folder inside it that holds the SAE; may be left out where there is only one.
        revision: a branch, tag or commit of a Hub repo.
        device, dtype: where the weights go; dtype None keeps the stored one.

    Raises:
        FormatError: a layout, key, tensor or shape that cannot be read without guessing.
        FileNotFoundError: no such folder in the source; the message lists those there are.
        huggingface_hub.errors.HfHubHTTPError: the Hub's own answers, unchanged.

    >>> load("bundled", "resid_post.2").num_latents
    1024
    """
    folder = _local(source)
    if folder is None:
        folder, commit = _download(str(source), path, revision)
    else:
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for Hub repos; {source} is a local folder")
        folder, commit = _inside(folder, path, source), None
    sae = read(folder, device, dtype)
    if commit is not None:
        sae.metadata |= {"source": str(source), "revision": commit}
    return sae


def load_all(source: str | Path, pattern: str = "*", **options: Any) -> dict[str, SAE]:
    """Every SAE of a source whose path matches `pattern`, keyed by hookpoint.

    `options` are those of `load`. Raises ValueError if two SAEs read the same hookpoint.

    >>> list(load_all("bundled", "resid_post.*"))
    ['resid_post.0', 'resid_post.1', 'resid_post.2', 'resid_post.3']
    """
    paths = [p for p in _paths(source, options.get("revision")) if fnmatch(p, pattern)]
    if not paths:
        raise FileNotFoundError(f"{source}: no SAE matches {pattern!r}; {_listing(source)}")
    found: dict[str, SAE] = {}
    for path in paths:
        sae = load(source, path or None, **options)
        key = str(sae.hookpoint) if sae.hookpoint is not None else path
        if key in found:
            raise ValueError(
                f"{source}: two SAEs read {key}; narrow the pattern or load one by path"
            )
        found[key] = sae
    return found


def load_string(source: str) -> SAE:
    """`repo:path` or `repo`, as `attach` and the command line take them."""
    repo, _, path = source.partition(":")
    return load(repo, path or None)


set_loader(load_string)


def _local(source: str | Path) -> Path | None:
    if str(source) == bundled.NAME:
        return bundled.SAES
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such folder")
    return None


def _inside(folder: Path, path: str | None, source: str | Path) -> Path:
    if path is None:
        if (folder / CONFIG).is_file():
            return folder
        paths = _paths(source, None)
        if len(paths) == 1:
            return folder / paths[0]
        raise FileNotFoundError(f"{source}: which SAE? {_listing(source)}")
    inner = folder / _safe(path)
    if not inner.is_dir():
        raise FileNotFoundError(f"{source}: no folder {path!r}; {_listing(source)}")
    return inner


def _download(repo: str, path: str | None, revision: str | None) -> tuple[Path, str]:
    """Fetch the two files of one SAE; the folder they lie in, and the commit they came from."""
    prefix = "" if path is None else f"{_safe(path)}/"
    try:
        config = Path(hf_hub_download(repo, prefix + CONFIG, revision=revision))
        commit = config.parents[prefix.count("/")].name  # snapshots/<commit>/<prefix>cfg.json
        hf_hub_download(repo, prefix + WEIGHTS, revision=commit)
    except RemoteEntryNotFoundError:
        paths = _paths(repo, revision)
        if path is None and len(paths) == 1 and paths[0]:
            return _download(repo, paths[0], revision)
        listing = _listing(repo, revision)
        raise FileNotFoundError(f"{repo}: no SAE at {path or 'its root'}; {listing}") from None
    return config.parent, commit


def _paths(source: str | Path, revision: str | None) -> list[str]:
    """Folders of a source that hold an SAE, relative to it; '' for its root."""
    folder = _local(source)
    if folder is not None:
        configs = (p.relative_to(folder).as_posix() for p in folder.rglob(CONFIG))
    else:
        files = HfApi().list_repo_files(str(source), revision=revision)
        configs = (name for name in files if PurePosixPath(name).name == CONFIG)
    parents = (PurePosixPath(name).parent.as_posix() for name in configs)
    return sorted("" if parent == "." else parent for parent in parents)


def _listing(source: str | Path, revision: str | None = None) -> str:
    paths = _paths(source, revision)
    shown = ", ".join(path or "(root)" for path in paths[:12])
    return f"it holds {shown}{' …' if len(paths) > 12 else ''}" if paths else "it holds no SAE"


def _safe(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not path.strip():
        raise FormatError(f"path {path!r}: expected a folder inside the source")
    return parts.as_posix()
