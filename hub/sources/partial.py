"""An SAE of a source whose list of files may not be whole: loaded only if nothing can be missing.

A format may leave a config out, and is then read otherwise (circuit-tracer's ReLU is a TopK where
a config says so). Offline, a config that is not cached looks like one that was left out.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import PurePosixPath

from huggingface_hub.errors import LocalEntryNotFoundError

from saert.hub.checkpoint import Found
from saert.hub.errors import FormatError
from saert.hub.format import choose
from saert.hub.sources.folder import Source, safe_path
from saert.hub.sources.web import configs_beside


def choose_whole(source: Source, path: str | None) -> Found:
    """What `choose` gives, unless files nobody knows of could change how it is read.

    Raises LocalEntryNotFoundError then; warns where a path that is not an SAE's own could mean
    several.
    """
    try:
        found = choose(source, path)
    except LocalEntryNotFoundError:
        raise
    except (FileNotFoundError, FormatError):
        refuse_partial_choice(source)
        raise
    if source.partial is None:
        return found
    if path is None or safe_path(path) not in (found.path, found.weights, *found.configs):
        warn_of_partial_choice(source)
    refuse_partial_configs(source, found)
    return found


def warn_of_partial_choice(source: Source) -> None:
    """Say so where there may be more SAEs than those that are cached."""
    if source.partial is not None:
        warnings.warn(
            f"{source.name}: only cached SAEs are looked at, and there may be more: the list of "
            f"its files is not cached, and {source.partial}",
            stacklevel=4,
        )


def refuse_partial_configs(source: Source, found: Found) -> None:
    """Raise LocalEntryNotFoundError where an SAE may have configs that are not cached."""
    if source.partial is not None and (unknown := _unknown(source, found)):
        raise _error(source, f"whether {found.path or 'the SAE'} has {' or '.join(unknown)}")


def refuse_partial_choice(source: Source) -> None:
    """Raise LocalEntryNotFoundError where the SAEs of a source cannot all be known."""
    if source.partial is not None:
        raise _error(source, "which SAEs there are")


def _unknown(source: Source, found: Found) -> list[str]:
    """Configs that the SAE may have: not listed, and not known to be missing."""
    names, unknown = frozenset(source.names()), dict[str, None]()
    for family in found.families:
        nearest: set[str] = set()  # a config in a folder above counts only without a nearer one
        for config in configs_beside(found.weights, [replace(family, needs=())], above=None):
            base = PurePosixPath(config).name
            if config in names:
                nearest.add(base)
            elif base not in nearest and not source.lacks(config):
                unknown[config] = None
    return list(unknown)


def _error(source: Source, what: str) -> LocalEntryNotFoundError:
    return LocalEntryNotFoundError(
        f"{source.name}: it is not known {what}: the list of its files is not cached, and "
        f"{source.partial}. Load it once while the Hub answers, which completes the cache"
    )
