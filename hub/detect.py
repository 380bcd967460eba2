"""Which SAEs a list of file names promises, and which family a checkpoint belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from saert.hub.checkpoint import Checkpoint, Family, Found
from saert.hub.errors import Unrecognised
from saert.hub.files.tensors import SUFFIXES
from saert.hub.formats import (
    batchtopk,
    circuit_tracer,
    ckkissane,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    open_sae,
    openai,
    qresearch,
    qwen_scope,
    refused,
    saelens,
    saelens_legacy,
    sparsify,
)

FAMILIES: tuple[Family, ...] = (
    *saelens.FAMILIES,
    *saelens_legacy.FAMILIES,
    *sparsify.FAMILIES,
    *dictionary_learning.FAMILIES,
    *batchtopk.FAMILIES,
    *qwen_scope.FAMILIES,
    *ckkissane.FAMILIES,
    *openai.FAMILIES,
    *goodfire.FAMILIES,
    *qresearch.FAMILIES,
    *gemma_scope.FAMILIES,
    *gemma_scope_2.FAMILIES,
    *llama_scope.FAMILIES,
    *llama_scope_r1.FAMILIES,
    *llamascopium.FAMILIES,
    *circuit_tracer.FAMILIES,
    *open_sae.FAMILIES,
    *refused.FAMILIES,
)

MOST_FOLDERS = 4
"""Levels that a family's pattern may name below an SAE's folder."""


def find_saes(names: Iterable[str], families: Iterable[Family] = FAMILIES) -> list[Found]:
    """The SAEs among the files of a source, in the order of their paths.

    >>> [one.path for one in find_saes(["a/cfg.json", "a/sae_weights.safetensors", "README.md"])]
    ['a']
    """
    present = frozenset(names)
    families = tuple(families)
    found: list[Found] = []
    for name in sorted(one for one in present if one.endswith(SUFFIXES)):
        fitting = [(family, one) for family in families if (one := _fit(family, name, present))]
        for path in dict.fromkeys(path for _, (path, _) in fitting):
            same = [(family, configs) for family, (p, configs) in fitting if p == path]
            configs = dict.fromkeys(config for _, names in same for config in names)
            found.append(Found(path, name, tuple(configs), tuple(family for family, _ in same)))
    return sorted(found, key=lambda one: one.path)


def firm(found: Sequence[Found]) -> list[Found]:
    """Those whose files nothing else is named like; all, if there are none such."""
    return [one for one in found if not all(f.loose for f in one.families)] or list(found)


def _fit(family: Family, name: str, present: frozenset[str]) -> tuple[str, tuple[str, ...]] | None:
    """The path and config files of the SAE whose weights are `name`, if it is this family's."""
    parts = PurePosixPath(name).parts
    for split in range(len(parts) - 1, max(-1, len(parts) - 1 - MOST_FOLDERS), -1):
        match = re.fullmatch(family.weights, "/".join(parts[split:]))
        if match is None:
            continue
        folder = PurePosixPath(*parts[:split])
        fields = match.groupdict()
        needed = [_place(one.format(**fields), folder, present) for one in family.needs]
        if None in needed:
            continue
        allowed = [_place(one.format(**fields), folder, present) for one in family.may]
        configs = tuple(one for one in (*needed, *allowed) if one is not None)
        path = name if family.is_file else ("" if str(folder) == "." else str(folder))
        return path, configs
    return None


def _place(config: str, folder: PurePosixPath, present: frozenset[str]) -> str | None:
    """Where a config file lies; one marked "^" may lie in a folder above."""
    above = config.startswith("^")
    for place in (folder, *folder.parents) if above else (folder,):
        if (path := str(place / config.lstrip("^"))) in present:
            return path
    return None


def family_of(checkpoint: Checkpoint, candidates: Iterable[Family]) -> Family:
    """The first candidate that recognises the tensors and configs.

    Raises Unrecognised naming the tensors that were found and the families that were asked.
    """
    candidates = tuple(candidates)
    for family in candidates:
        if family.recognises(checkpoint):
            return family
    raise Unrecognised(
        f"{checkpoint.where}: {PurePosixPath(checkpoint.weights).name} holds tensors "
        f"{sorted(checkpoint.tensors.names)[:20]} and configs {sorted(checkpoint.configs)}, "
        f"which is none of: {', '.join(family.name for family in candidates)}"
    )
