"""Directory ⇄ SAE: which layout a folder holds, reading it, and writing one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from saert.hub.checkpoint import Checkpoint, Found
from saert.hub.detect import family_of, find_saes, firm
from saert.hub.errors import FormatError
from saert.hub.files.parse import read_config
from saert.hub.files.tensors import open_tensors
from saert.hub.formats import saelens_write, sparsify_write
from saert.hub.sources.folder import Folder, Source, safe_path
from saert.sae import SAE

__all__ = ["FormatError", "choose", "listing", "read", "read_found", "save"]


def read(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> SAE:
    """The one SAE in a local folder, whatever layout it holds.

    Raises FormatError naming the files that were found, if no layout is recognised.
    """
    source = Folder(folder)
    return read_found(source, choose(source, None), device, dtype, options)


def save(sae: SAE, folder: str | Path, *, format: str = "saelens") -> None:
    """Write an SAE into a folder, in the layout of SAELens (and saert) or of sparsify.

    sparsify's holds the weights and no metadata: where the SAE reads is the folder's name, which
    `sparsify_write.folder_name` gives.

    Raises ValueError for an unknown format, and for an SAE that sparsify cannot compute.

    >>> save(sae, "my-saes/resid_post.6")
    >>> save(sae, "my-saes/layers.6", format="sparsify")
    """
    writers = {"saelens": saelens_write.write, "sparsify": sparsify_write.write}
    if format not in writers:
        raise ValueError(f"save: format {format!r}, expected {' or '.join(map(repr, writers))}")
    writers[format](sae, Path(folder))


def choose(source: Source, path: str | None) -> Found:
    """The SAE that a path means: its folder, a file of it, or a folder that holds only it.

    Raises FileNotFoundError listing what there is; FormatError where there is no SAE at all.
    """
    names = source.names()
    found = find_saes(names)
    if not found:
        raise FormatError(
            f"{source.name}: no SAE found in a layout that saert reads; it holds "
            f"{sorted(names)[:10]}"
        )
    if path is None:
        found = firm(found)
        at_root = [one for one in found if one.path == ""]
        for chosen in (found, at_root):
            if len(chosen) == 1:
                return chosen[0]
        raise FileNotFoundError(f"{source.name}: which SAE? {listing(found)}")
    wanted = safe_path(path)
    wanted = "" if wanted == "." else wanted
    named = [one for one in found if wanted in (one.path, one.weights)]
    described = [one for one in found if wanted in one.configs]
    below = [one for one in found if PurePosixPath(wanted) in PurePosixPath(one.path).parents]
    if len(chosen := firm(named or described or below)) == 1:
        return chosen[0]
    raise FileNotFoundError(
        f"{source.name}: {'which' if chosen else 'no'} SAE at {path!r}{'?' if chosen else ''}; "
        f"{listing(chosen or found)}"
    )


def read_found(
    source: Source,
    found: Found,
    device: torch.device | str,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> SAE:
    where = f"{source.name}/{found.path}" if found.path else source.name
    try:
        configs = {PurePosixPath(one).name: read_config(source.fetch(one)) for one in found.configs}
        tensors = open_tensors(source.fetch(found.weights), device, dtype)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    checkpoint = Checkpoint(where, found.path, found.weights, configs, tensors, options)
    family = family_of(checkpoint, found.families)
    if unknown := sorted(set(options) - family.options):
        raise TypeError(
            f"{where}: unknown options {unknown}; a {family.name} checkpoint has "
            f"{sorted(family.options) or 'none'}"
        )
    try:
        sae = family.read(checkpoint)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # a value of a type that its writer never writes, at a place that nobody thought of
        raise FormatError(
            f"{where}: expected a {family.name} checkpoint as its makers write it; found "
            f"{type(error).__name__}: {error}"
        ) from error
    if source.commit is not None:
        sae.metadata |= {"source": source.name, "path": found.path, "revision": source.commit}
    return sae


def listing(found: Iterable[Found]) -> str:
    found = list(found)
    names = [one.path or "(root)" for one in found]
    paths = [
        name if names.count(name) == 1 else one.weights
        for name, one in zip(names, found, strict=True)
    ]
    shown = ", ".join(paths[:12])
    return f"it holds {shown}{' …' if len(paths) > 12 else ''}" if paths else "it holds no SAE"
