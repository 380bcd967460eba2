"""Checkpoints: written whole or not at all, readable by another number of processes, pruned.

    checkpoints/step-000000200/     the tensors (torch.distributed.checkpoint), `state.json`

A folder gets its name when everything in it is on the disk; a name without a dot in front is a
checkpoint that loads. Latent-sharded tensors are saved as what they are parts of.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate, Shard

from saert.train.cache import sealed, sha256, unsealed, write_atomically
from saert.train.dictionary import is_replicated
from saert.train.mesh import Mesh

STATE = "state.json"
_NAME = re.compile(r"step-(\d{9})$")
_WAY_OUT = ". Remove it to go on from the one before, or choose another output folder"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says what is left and what to do."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(p for p in found if _NAME.search(p.name) and (p / STATE).is_file())


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    mesh: Mesh,
    keep: int,
) -> None:
    """Write the checkpoint of `step` and remove all but the last `keep`. All ranks call it.

    Raises CheckpointError if it cannot be written; the checkpoints before it stay.
    """
    name = f"step-{step:09d}"
    partial = folder / f".{name}.partial"
    try:
        if mesh.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        mesh.wait()
        with _quiet():
            state_dict_saver.save(_placed(tensors, mesh), checkpoint_id=partial)
        if mesh.is_first:
            files = {path.name: sha256(path) for path in sorted(partial.iterdir())}
            content = sealed({**state, "step": step, "files": files})
            write_atomically(partial / STATE, content)
            _sync(partial)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.rename(partial, folder / name)
            _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_explain(error, folder)) from error
    except CheckpointException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_explain(_cause(error), folder)) from error
    mesh.wait()
    if mesh.is_first:
        for old in checkpoints(folder)[: -max(1, keep)]:
            shutil.rmtree(old)


def read_state(path: Path) -> dict[str, Any]:
    """What `save` was given as state, its step, and its files' checksums.

    Raises CheckpointError if it is damaged.
    """
    found = unsealed((path / STATE).read_bytes())
    if found is None:
        raise CheckpointError(f"checkpoint {path.name}: {STATE} is damaged{_WAY_OUT}")
    return found


def load(path: Path, tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Fill `tensors` in place from a checkpoint, whatever number of processes wrote it.

    Raises CheckpointError if a tensor is missing or has another shape, or a file is damaged.
    """
    files = sorted(read_state(path)["files"].items())
    own = files[mesh.replica * mesh.shards + mesh.shard :: mesh.world]
    damaged = [name for name, sha in own if not _is(path / name, sha)]
    if mesh.any(bool(damaged)):  # torch would read most of it, and wrong numbers among it
        name = damaged[0] if damaged else "a file"
        raise CheckpointError(f"checkpoint {path.name}: {name} is damaged{_WAY_OUT}")
    try:
        with _quiet():
            state_dict_loader.load(_placed(tensors, mesh), checkpoint_id=path)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {path.name}: {_cause(error)}; it belongs to another configuration"
            f"{_WAY_OUT}"
        ) from error


def _is(path: Path, sha: str) -> bool:
    return path.is_file() and sha256(path) == sha


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning, at each save, that there is one process: that is how most runs are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _placed(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    if mesh.device_mesh is None:
        return dict(tensors)
    placed: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if is_replicated(name, t):
            placed[name] = t
        else:
            placement = (Replicate(), Shard(0))
            placed[name] = DTensor.from_local(t, mesh.device_mesh, placement, run_check=False)
    return placed


def _cause(error: BaseException) -> BaseException:
    """The first error of a rank, instead of DCP's list of all."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        found: BaseException = first[0] if isinstance(first, tuple) else first
        return found
    return error


def _explain(error: BaseException, folder: Path) -> str:
    left = checkpoints(folder)
    kept = f"the last good checkpoint is {left[-1].name}" if left else "there is no earlier one"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: the checkpoint was not written; {kept}. Free space, run again"
    return f"the checkpoint was not written ({error}); {kept}"


def _sync(folder: Path) -> None:
    """Directory entries and files of a folder onto the disk."""
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
