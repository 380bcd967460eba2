"""What a repo of the Hub holds, and what a publication makes of it. Nothing here asks the network.

What is not saert's is left alone: files beside an SAE whose weights stay as they are, and pictures
that `saes.json` does not list.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from huggingface_hub.hf_api import RepoFile

from saert.hub.formats.sparsify import TRAINING as MODEL_FILE
from saert.hub.publishing.entry import Entry
from saert.hub.publishing.given import BESIDE, METRICS, TRAINING
from saert.hub.publishing.stage import INDEX, PLOTS, WEIGHTS

Tree = Mapping[str, RepoFile]


@dataclass(frozen=True)
class Index:
    """What `saes.json` says: the SAEs, and which pictures were drawn of them."""

    saes: dict[str, Entry] = field(default_factory=dict)
    plots: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The file's text."""
        found = {path: entry.to_dict() for path, entry in self.saes.items()}
        content = {"saes": found, "plots": list(self.plots)}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Merged:
    """Attributes:
    entries: all SAEs that the repo will hold.
    unchanged: of those published now, the ones whose weights and config are there already.
    stale: those whose weights somebody replaced since; what was said of the old ones is dropped.
    """

    entries: dict[str, Entry]
    unchanged: frozenset[str]
    stale: tuple[str, ...]


def read_index(text: str, repo_id: str) -> Index:
    """Raises ValueError unless it is what `Index.to_json` gives."""
    where = f"{repo_id}: {INDEX}"
    try:
        content = json.loads(text)
        saes, plots = content["saes"].items(), content.get("plots", [])
        plots = tuple(name for name in PLOTS if name in plots)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{where}: not what saert writes; delete it there to go on") from None
    return Index({path: Entry.from_dict(one, f"{where}: {path}") for path, one in saes}, plots)


def merge(new: Mapping[str, Entry], before: Mapping[str, Entry], there: Tree) -> Merged:
    """The SAEs that the repo holds already and those that are published now."""
    folders = {str(above) for name in there for above in PurePosixPath(name).parents}
    entries, stale = dict[str, Entry](), []
    for path, entry in before.items():
        if path in new or path not in folders:
            continue
        found = _weights(path, entry, there)
        if entry.weights is not None and found is not None and found != entry.weights:
            stale.append(path)
            entry = replace(
                entry, metrics=None, measured_on=None, training=None, weights=found, config=None
            )
        entries[path] = entry
    unchanged = set()
    for path, entry in new.items():
        old = before.get(path)
        same = old is not None and old.config in (None, entry.config)
        if old is not None and same and _weights(path, entry, there) == entry.weights:
            unchanged.add(path)
            entry = _carried(path, entry, old, there)
        entries[path] = entry
    return Merged(entries, frozenset(unchanged), tuple(stale))


def left_over(
    new: Collection[str], merged: Merged, before: Index, wanted: Collection[str], there: Tree
) -> Iterator[str]:
    """Files of an earlier publication that nobody needs: another layout's weights, what was said
    of weights that are replaced now, pictures."""
    for name in there:
        folder, _, file = name.rpartition("/")
        if name in wanted:
            continue
        if name in before.plots or (folder in new and file in WEIGHTS.values()):
            yield name
        replaced = folder in new and folder in before.saes and folder not in merged.unchanged
        if replaced and file in BESIDE:
            yield name


def model_file(
    entries: Mapping[str, Entry], before: Mapping[str, Entry], there: str | None, repo_id: str
) -> dict[str, bytes]:
    """The root's `config.json`, from which sparsify's readers learn the model; {} to let it be.

    `there`: the one that is there; its other keys stay. Raises ValueError if it names another
    model, which no publication of saert's named.
    """
    models = {one.base_model for one in entries.values() if one.layout == "sparsify"}
    if not models:
        return {}
    (model,) = models
    known = {"model": model, "sae": {}}  # `sae`: by that key it is told from a model's own config
    if there is not None:
        try:
            found = json.loads(there)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "sae" not in found:
            return {}  # somebody else's
        named = found.get("model", model)
        if named != model and named not in {one.base_model for one in before.values()}:
            raise ValueError(
                f"{repo_id}: {MODEL_FILE} says that its SAEs are for {named!r}, not {model!r}: "
                "publish into another repo, or correct that file"
            )
        if named == model and "model" in found:
            return {}
        known = found | {"model": model}
    return {MODEL_FILE: (json.dumps(known, indent=1) + "\n").encode()}


def _weights(path: str, entry: Entry, there: Tree) -> str | None:
    """sha256 of an SAE's weights in the repo."""
    file = there.get(f"{path}/{WEIGHTS.get(entry.layout, '')}")
    return None if file is None or file.lfs is None else file.lfs.sha256


def _carried(path: str, new: Entry, old: Entry, there: Tree) -> Entry:
    """The same SAE again: what was known of it, and still lies beside it, is still known."""
    if f"{path}/{METRICS}" in there:
        if new.metrics is None:
            new = replace(new, metrics=old.metrics, measured_on=old.measured_on)
        elif new.metrics == old.metrics:
            new = replace(new, measured_on=new.measured_on or old.measured_on)
    if f"{path}/{TRAINING}" in there and new.training is None:
        new = replace(new, training=old.training)
    if f"{path}/{TRAINING}" in there and new.dataset is None:
        new = replace(new, dataset=old.dataset)
    return new
