"""What is to be published, as it lies on this machine: SAEs, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from saert.hub.checkpoint import Found
from saert.hub.detect import find_saes
from saert.hub.errors import CORRUPT, FormatError
from saert.hub.files.parse import MOST_BYTES, parse_json, read_config
from saert.hub.format import read_found
from saert.hub.sources.folder import Folder, file_size
from saert.sae import SAE

METRICS, TRAINING, LABELS = "metrics.json", "training.json", "labels.json"
BESIDE = (METRICS, TRAINING, LABELS)
RUN, EVALUATION = "run.json", "eval.json"
PLACES = ("", "eval*/", "saes/", "saes/eval*/")  # where it may lie
LOSSES = ("ce", "ce_spliced", "ce_zero", "ce_recovered", "kl_spliced", "kl_zero", "kl_recovered")
MOST_LABELS = 64 << 20  # bytes: words for a million latents


@dataclass(frozen=True)
class Given:
    """An SAE, what lies beside it, and what it is called where it comes from."""

    name: str
    sae: SAE
    beside: Mapping[str, Any]


def each(saes: SAE | Mapping[str, SAE]) -> Iterator[Given]:
    if isinstance(saes, SAE):
        yield Given(str(saes.hookpoint), saes, {})
        return
    if not saes:
        raise ValueError("nothing to publish: the dict is empty")
    for name, sae in saes.items():
        if not isinstance(sae, SAE):
            raise TypeError(f"{name!r} is a {type(sae).__name__}, expected an SAE")
        yield Given(name, sae, {})


def in_folder(folder: Path) -> Iterator[Given]:
    """The SAEs of a folder, one in memory at a time; those of a training run lie in saes/."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / RUN).is_file():
        if not (folder / "saes").is_dir():
            raise FileNotFoundError(f"{folder}: a training run that has not finished an SAE yet")
        folder = folder / "saes"
    source = Folder(folder)
    found = find_saes(source.names())
    if not found:
        raise FormatError(f"{folder}: no SAE in a layout that saert reads")
    for one in found:
        yield _read(source, one)


def _read(source: Folder, found: Found) -> Given:
    is_file = found.path == found.weights
    home = PurePosixPath(found.path).parent if is_file else PurePosixPath(found.path)
    beside = {
        name: _read_json(source.fetch(str(home / name)))
        for name in BESIDE
        if (source.root / home / name).exists()
    }
    name = str(PurePosixPath(found.path).with_suffix("")) if is_file else found.path
    return Given(name, read_found(source, found, "cpu", None, {}), beside)


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object, or None for null: a run that measured nothing says so."""
    size = file_size(path)
    if size < 16 and path.read_bytes().strip() == b"null":
        return None
    if path.name != LABELS or size <= MOST_BYTES:
        return read_config(path)
    if size > MOST_LABELS:
        raise FormatError(f"{path.name}: {size} bytes, expected at most {MOST_LABELS}")
    try:
        found = parse_json(path.read_bytes())
    except CORRUPT as error:
        raise FormatError(f"{path.name}: not JSON ({str(error)[:300]})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path.name}: found a {type(found).__name__}, expected an object")
    return found


def evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """What `saert eval` left in a folder: metrics by the SAE's fingerprint."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(one for pattern in PLACES for one in folder.glob(f"{pattern}{EVALUATION}")):
        content = read_config(Folder(folder).fetch(file.relative_to(folder).as_posix()))
        try:
            text = str(content["facts"]["text"]["source"]).partition(";")[0]
            found |= {entry["fingerprint"]: _short(entry, text) for entry in content["saes"]}
        except (KeyError, TypeError, AttributeError):
            raise FormatError(f"{file}: expected what `saert eval` writes") from None
    return found


def _short(entry: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The numbers of `eval.json` that `metrics.json` has, by the same names."""
    reconstruction, downstream = entry["reconstruction"], entry["downstream"]
    return (
        {key: reconstruction[key] for key in ("fvu", "l0", "dead")}
        | {key: downstream[key] for key in LOSSES}
        | {"tokens": reconstruction["tokens"], "density": reconstruction["density"], "text": text}
    )
