"""What decided a run's numbers, written down: `run.json`, and the `training.json` beside each SAE.

Names say nothing about the machine: of a local path the last part is kept, with checksums of what
it held.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saert.hub import bundled
from saert.train.cache import sha256, write_atomically
from saert.train.config import ConfigError, TrainConfig

FILE = "run.json"
PACKAGES = ("saert", "torch", "transformers", "datasets", "tokenizers", "safetensors")
# may change when a run goes on: none of them moves a number that training computes
FREE = (
    "config.checkpoint",
    "config.evaluation",
    "config.shards",
    "config.stream.forward_rows",
    "data.datasets",
)


def record(
    config: TrainConfig, data: Mapping[str, Any], model_config: Any, **more: Any
) -> dict[str, Any]:
    """Plain data. `data`: `Documents.facts()`; `model_config`: the transformers configuration."""
    return {
        "config": public(config),
        "data": dict(data),
        "model": model_facts(config, model_config),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "git_commit": git_commit(),
        **more,
    }


def public(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON, without paths."""
    found = config.to_dict()
    found["data"]["source"] = [public_name(source) for source in config.data.source]
    found["model"]["name"] = public_name(config.model.name)
    if config.sae.init is not None:
        found["sae"]["init"] = public_name(config.sae.init)
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def public_name(name: str) -> str:
    """A Hub id as it is, a local path's last part."""
    if name == bundled.NAME:
        return bundled.BASE_MODEL
    local = Path(name).expanduser()
    return local.name if local.is_absolute() or local.exists() or "*" in name else name


def model_facts(config: TrainConfig, model_config: Any) -> dict[str, Any]:
    """Which weights: the Hub's commit, or of a local folder one sha256 over its weight files."""
    name = config.model.name
    folder = bundled.MODEL if name == bundled.NAME else Path(name).expanduser()
    found = {
        "name": public_name(name),
        "commit": getattr(model_config, "_commit_hash", None),
    }
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        sums = "".join(f"{p.name} {sha256(p)}\n" for p in files)
        found["sha256"] = hashlib.sha256(sums.encode()).hexdigest()
    return found


def as_before(folder: Path, config: TrainConfig) -> TrainConfig:
    """The configuration with the revisions that a run in this folder began with, where it names
    none: a run goes on with its own data and model though the Hub has newer ones."""
    path = folder / FILE
    if not path.exists():
        return config
    before = json.loads(path.read_text(encoding="utf-8"))
    data, model = config.data, config.model
    if data.revision is None and data.source[0] == before["data"].get("dataset"):
        data = replace(data, revision=before["data"].get("revision"))
    if model.revision is None and public_name(model.name) == before["model"].get("name"):
        model = replace(model, revision=before["model"].get("commit"))
    return replace(config, data=data, model=model)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ConfigError if another process has it; a process that was
    killed does not."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is training in {folder}") from None
        yield


def check_folder(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ConfigError if the folder holds another run."""
    path = folder / FILE
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    parts = ("config", "data", "model")
    old = _flat({part: before.get(part, {}) for part in parts})
    new = _flat(json.loads(json.dumps({part: wanted[part] for part in parts})))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and not key.startswith(FREE):
            raise ConfigError(
                f"{folder} holds a run with {key} = {old.get(key)!r}, this one has "
                f"{new.get(key)!r}; choose another folder, or the old settings to go on"
            )


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """The record into the run's folder, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, json.dumps(found, indent=2).encode())


def git_commit() -> str | None:
    """The commit of the checkout that saert runs from, with "+" if files differ from it; None
    where saert is installed, though that be inside somebody else's checkout."""
    here = Path(__file__).resolve()
    try:
        root = Path(_git(here.parent, "rev-parse", "--show-toplevel"))
        _git(root, "ls-files", "--error-unmatch", str(here))
        changed = _git(root, "status", "--porcelain")
        return _git(root, "rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables with dotted keys, as settings name them."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        found |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
