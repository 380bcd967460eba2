"""What is to be published, read, checked and written into a folder of this machine.

Everything that can be wrong with it is found here, before anything is asked of the network.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from saert.hub.format import read, save
from saert.hub.formats import saelens, sparsify
from saert.hub.formats.saelens_write import saelens_can_read
from saert.hub.formats.sparsify_write import check_folder, folder_name
from saert.hub.identity import describe_sae, fingerprint
from saert.hub.publishing import plots as card_plots
from saert.hub.publishing.entry import HUB_ID, Entry, check_metrics
from saert.hub.publishing.given import (
    BESIDE,
    LABELS,
    METRICS,
    TRAINING,
    Given,
    each,
    evaluations,
    in_folder,
)
from saert.hub.publishing.names import check_path
from saert.hub.publishing.plain import check_json
from saert.hub.publishing.private import refuse_secrets, without_paths
from saert.hub.verifying.static_checks import check_weights
from saert.sae import SAE
from saert.transforms import NoTransform

CARD, INDEX = "README.md", "saes.json"
PLOTS = (card_plots.MEASURED, card_plots.DENSITY)
CONFIG = saelens.CONFIG  # sparsify's has the same name
WEIGHTS = {"saelens": saelens.WEIGHTS, "saert": saelens.WEIGHTS, "sparsify": sparsify.WEIGHTS}
RESERVED = (CARD, INDEX, *PLOTS, CONFIG, sparsify.TRAINING, *WEIGHTS.values(), *BESIDE)
WHERE_FROM = ("source", "path", "revision", "name")  # what `load` writes into an SAE's metadata

Saes = SAE | Mapping[str, SAE] | str | Path
Measured = Mapping[str, dict[str, Any]]  # by fingerprint


@dataclass(frozen=True)
class Staged:
    """Attributes:
    files: by path in the repo, where each lies on this machine.
    entries: by path in the repo, what the card says of each SAE.
    """

    files: dict[str, Path]
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Settings:
    """What `publish` was told about all SAEs; see there."""

    repo_id: str
    format: str = "saelens"
    into: str = ""
    base_model: str | None = None
    model_type: str | None = None
    secrets: tuple[str, ...] = ()


def stage(saes: Saes, folder: Path, settings: Settings) -> Staged:
    """Write every SAE, one after the other, below `folder`.

    Raises:
        FormatError: an SAE that cannot be read, or that `load` would refuse.
        ValueError: an SAE without hookpoint or base model, several base models, two SAEs with one
            name, names that are no paths, links out of the folder, impossible metrics, values that
            JSON does not have, secrets.
    """
    if isinstance(saes, SAE | Mapping):
        given, measured = each(saes), dict[str, dict[str, Any]]()
    else:
        home = _expanded(saes)
        given, measured = in_folder(home), evaluations(home)
    written: list[tuple[str, Entry, Path]] = []
    for number, one in enumerate(given):
        clean = _clean(one, settings, measured)
        at, name = folder / str(number), one.name
        if settings.format == "sparsify":  # which reads the folder's name
            name = name if isinstance(saes, Mapping) else _module(clean.sae, settings.model_type)
            check_path(_path(settings, name), RESERVED)
            at = at / _path(settings, name)
            check_folder(name, clean.sae, _model_type(clean.sae, settings.model_type))
        written.append((name, _write(clean, at, settings.format), at))
    if settings.format != "sparsify" and not isinstance(saes, Mapping):
        written = _by_hookpoint(written)
    entries = {_path(settings, name): entry for name, entry, _ in written}
    _check_paths([_path(settings, name) for name, _, _ in written])
    files = {
        f"{_path(settings, name)}/{file.name}": file
        for name, _, at in written
        for file in sorted(at.iterdir())
    }
    if len(models := sorted({entry.base_model for entry in entries.values()})) > 1:
        raise ValueError(f"SAEs of several models, {models}: publish each into its own repo")
    return Staged(files, entries)


def _expanded(folder: str | Path) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{folder}: no such user here") from None


def _path(settings: Settings, name: str) -> str:
    return str(PurePosixPath(settings.into) / name)


def _check_paths(paths: list[str]) -> None:
    """Raise ValueError for names that not every system can hold, or not beside each other."""
    spelt: dict[str, str] = {}
    for path in paths:
        check_path(path, RESERVED)
        if paths.count(path) > 1:
            raise ValueError(f"two SAEs would be called {path!r}; publish each into its own folder")
        for above in (path, *map(str, PurePosixPath(path).parents)):
            if (other := spelt.setdefault(above.lower(), above)) != above:
                raise ValueError(
                    f"{above!r} and {other!r} differ in case only, and are one folder on some "
                    "systems; rename one"
                )


# -- checking and writing --------------------------------------------------------------------------


def _clean(one: Given, settings: Settings, measured: Measured) -> Given:
    """The same with its metrics found, and everything private taken out."""
    if one.sae.hookpoint is None:
        raise ValueError(f"{one.name}: it does not say where it reads; set its `hookpoint`")
    model = settings.base_model or one.sae.metadata.get("base_model")
    if not isinstance(model, str) or not HUB_ID.fullmatch(model):
        raise ValueError(
            f"{one.name}: base_model is {without_paths(model)!r}, expected a Hub id like "
            "'openai-community/gpt2'; give base_model (--base-model)"
        )
    metrics = _metrics(one, measured)
    metadata = _provenance(one.sae, settings.repo_id)
    metadata |= {"base_model": model, "model_name": model}
    metadata.pop("metrics", None)
    metadata |= {"metrics": metrics} if metrics else {}
    beside = {METRICS: metrics, **{key: one.beside.get(key) for key in (TRAINING, LABELS)}}
    for name, content in {CONFIG: metadata, **beside}.items():
        check_json(content, f"{one.name}: {name}")
        refuse_secrets(content, f"{one.name}: {name}", settings.secrets)
    sae = copy.copy(one.sae)
    sae.metadata = without_paths(metadata)
    return Given(one.name, sae, {name: without_paths(found) for name, found in beside.items()})


def _metrics(one: Given, measured: Measured) -> dict[str, Any] | None:
    """Of what was measured on an SAE, that on most tokens."""
    own = one.beside.get(METRICS) or one.sae.metadata.get("metrics")
    if own and not isinstance(own, Mapping):
        raise ValueError(f"{one.name}: {METRICS} is a {type(own).__name__}, expected an object")
    check_metrics(own, f"{one.name}: {METRICS}")
    other = measured.get(fingerprint(one.sae)) if measured else None
    check_metrics(other, f"{one.name}: eval.json")
    both = [dict(found) for found in (other, own) if found]
    return max(both, key=_tokens, default=None)


def _tokens(metrics: Mapping[str, Any]) -> float:
    return metrics.get("tokens") or -1


def _provenance(sae: SAE, repo_id: str) -> dict[str, Any]:
    """Metadata in which an SAE that came from elsewhere says so.

    What only its original's short name says of its input (`load_as`) stays, until it is done.
    """
    metadata = sae.metadata
    done = {*WHERE_FROM} | ({"load_as"} if sae.input_transform != NoTransform() else set())
    kept = {key: value for key, value in metadata.items() if key not in done}
    source, path, revision = (metadata.get(key) for key in WHERE_FROM[:3])
    if source is not None and source != repo_id:
        kept["converted_from"] = f"{source}/{path}@{revision}" if path else f"{source}@{revision}"
    return kept


def _write(one: Given, at: Path, format: str) -> Entry:
    """The SAE's folder, read again as `load` would; what the card says of it."""
    save(one.sae, at, format=format)
    for name, content in one.beside.items():
        if content is not None:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
            (at / name).write_text(text + "\n", encoding="utf-8")
    back = check_weights(read(at), True)
    if (wrote := _meaning(one.sae, format)) != _meaning(back, format):
        raise ValueError(f"{one.name}: its layout cannot hold this SAE: {wrote}")
    layout = "saert" if format == "saelens" and not saelens_can_read(one.sae) else format
    entry = Entry.of(one.sae, layout, one.beside[METRICS], one.beside[TRAINING])
    config = json.loads((at / CONFIG).read_text(encoding="utf-8"))
    config.pop("metadata", None)
    with (at / WEIGHTS[layout]).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(entry, weights=weights, config=_hash(config))


def _hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _meaning(sae: SAE, format: str) -> dict[str, Any]:
    """What has to survive writing; sparsify spells hookpoints as its folders (`check_folder`)."""
    known = describe_sae(sae) | {"activation": type(sae.activation).__name__}
    if format == "sparsify":
        known |= {"hookpoint": sae.hookpoint is not None}
        known |= {"target_hookpoint": sae.target_hookpoint is not None}
    return known


def _model_type(sae: SAE, told: str | None) -> str | None:
    facts = sae.metadata.get("base_model_config")
    kind = told or (facts.get("model_type") if isinstance(facts, Mapping) else None)
    return kind if isinstance(kind, str) else None


def _module(sae: SAE, told: str | None) -> str:
    """The module's path by which sparsify finds an SAE."""
    if (kind := _model_type(sae, told)) is None:
        raise ValueError(
            f"{sae.hookpoint}: sparsify names folders after the model's modules; give model_type "
            "(--model-type gpt2), or the names, publish({'h.6': sae}, …)"
        )
    assert sae.hookpoint is not None
    return folder_name(sae.hookpoint, kind, sae.target_hookpoint)


def _by_hookpoint(written: list[tuple[str, Entry, Path]]) -> list[tuple[str, Entry, Path]]:
    """Called by hookpoint; where two share one, by their paths in the folder."""
    names = [entry.hookpoint.replace(":", "-") for _, entry, _ in written]
    return [
        (name if names.count(name) == 1 else path, entry, at)
        for name, (path, entry, at) in zip(names, written, strict=True)
    ]
