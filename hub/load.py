"""load: an SAE from the Hugging Face Hub, a local folder or the package, in any public layout."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch

from saert.hub.checkpoint import Found
from saert.hub.detect import find_saes, firm
from saert.hub.errors import Unrecognised
from saert.hub.format import listing, read_found
from saert.hub.registry import Known, lookup, note
from saert.hub.sources.folder import Source, safe_path
from saert.hub.sources.partial import (
    choose_whole,
    refuse_partial_choice,
    refuse_partial_configs,
    warn_of_partial_choice,
)
from saert.hub.sources.source import is_here, open_source
from saert.hub.sources.web import WebFile
from saert.hub.verifying.static_checks import check_option, check_weights
from saert.runtime import set_loader
from saert.sae import SAE


def load(
    source: str | Path,
    path: str | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool | Literal["warn"] = True,
    **options: Any,
) -> SAE:
    """An SAE, ready to attach.

    Args:
        source: a Hub repo (`org/repo`, `org/repo@revision:path`, its address on the web, or
            `hf://…`), a local folder laid out as one or a file in it, the https address of a
            weights file, a short name of the registry (`gpt2:openai-32k/resid_post.6`;
            `saert find MODEL` lists them), or "bundled".
        path: the folder or file inside it that holds the SAE; may be left out where there is only
            one.
        revision: a branch, tag or commit of a Hub repo. The commit that was loaded is
            `sae.metadata["revision"]`; a commit that is cached needs no network at all.
        device, dtype: where the weights go; dtype None keeps the stored one.
        verify: look at a few rows of the weights: True refuses what they contradict and warns of
            what is implausible, "warn" only warns, False does not look. `saert.verify` measures on
            a model (docs/verify.md).
        options: what a format leaves open (docs/formats.md).

    Raises:
        FormatError: a layout, key, tensor or shape that cannot be read without guessing.
        VerificationError: a FormatError; the weights contradict what is declared.
        FileNotFoundError: no such SAE in the source; the message lists those there are.
        huggingface_hub.errors.HfHubHTTPError: the Hub's own answers, unchanged.

    >>> load("bundled", "resid_post.2").num_latents
    1024
    """
    check_option(verify)
    known = _known(source) if path is None else None
    opened, inside = _open(source, known, revision, path)
    found = choose_whole(opened, inside)
    sae = _told(read_found(opened, found, device, dtype, options), opened, known)
    return check_weights(sae, verify)


def load_all(
    source: str | Path,
    pattern: str = "*",
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool | Literal["warn"] = True,
    **options: Any,
) -> dict[str, SAE]:
    """Every SAE of a source whose path matches `pattern`, keyed by hookpoint.

    The other arguments are those of `load`; a short name means its one SAE. Raises ValueError if
    two SAEs read the same hookpoint. Warns, without the Hub, if the list of a repo's files was
    never kept: there may be more SAEs than those that are cached.

    >>> list(load_all("bundled", "resid_post.*"))
    ['resid_post.0', 'resid_post.1', 'resid_post.2', 'resid_post.3']
    """
    check_option(verify)
    known = _known(source)
    opened, inside = _open(source, known, revision)
    found = find_saes(opened.names())
    warn_of_partial_choice(opened)
    chosen = [one for one in found if _matches(one, inside, pattern)]
    if not chosen:
        raise FileNotFoundError(f"{opened.name}: no SAE matches {pattern!r}; {listing(found)}")
    saes: dict[str, SAE] = {}
    stray: Unrecognised | None = None
    for one in firm(chosen):
        refuse_partial_configs(opened, one)
        try:
            sae = _told(read_found(opened, one, device, dtype, options), opened, known)
        except Unrecognised as error:  # an optimiser's state, a model's own weights
            stray = error
            continue
        key = str(sae.hookpoint) if sae.hookpoint is not None else one.path
        if key in saes:
            raise ValueError(
                f"{opened.name}: two SAEs read {key}; narrow the pattern or load one by path"
            )
        saes[key] = check_weights(sae, verify)
    if not saes and stray is not None:
        raise stray
    return saes


def load_string(source: str) -> SAE:
    """One SAE that a single string names, as `attach` and the command line take it."""
    return load(source)


def _known(source: str | Path) -> Known | None:
    """What a short name means. What exists on this machine goes first."""
    text = str(source)
    if isinstance(source, Path) or is_here(text):
        return None
    try:
        return lookup(text)
    except ValueError:  # no such name; a folder may be meant
        if is_here(text.partition(":")[0]):
            return None
        raise


def _open(
    source: str | Path, known: Known | None, revision: str | None, path: str | None = None
) -> tuple[Source, str | None]:
    if known is None:
        return open_source(source, revision, path)
    opened, _ = open_source(known.repo, revision)
    paths = [one.path for one in find_saes(opened.names())]
    if any(set(one) & set("*?[") for one in known.path):  # others may fit better
        refuse_partial_choice(opened)
    return opened, known.choose(paths)


def _told(sae: SAE, opened: Source, known: Known | None) -> SAE:
    """An SAE, told what its files do not say of it."""
    if isinstance(opened, WebFile):
        sae.metadata |= {"source": opened.address, "path": ""}  # what loads it again
    return note(sae, opened.name) if known is None else known.apply(sae)


def _matches(found: Found, inside: str | None, pattern: str) -> bool:
    """Whether an SAE lies inside, and its path below that fits the pattern."""
    if inside is None or inside in (found.path, found.weights):
        return fnmatch(found.path, pattern)
    below = found.path.removeprefix(safe_path(inside) + "/")
    return below != found.path and fnmatch(below, pattern)


set_loader(load_string)
