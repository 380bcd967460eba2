"""Activations on disk: safetensors files, one for each lane of each buffer, with their checksums.

A cache changes no number: the stream reads a buffer from it if it is there, and computes it, and
writes it while there is room, if it is not. So runs over one cache see the same batches, and a run
that was cut goes on where it stopped.

    cache.json              what the activations are: model, revision, data, hookpoints, context
    000012.json             sha256 and size of the buffer's files, and where the rows go on after it
    000012-lane3.safetensors
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saert.train.mesh import Mesh

FACTS = "cache.json"
HEADER = 256  # bytes in a file beside each tensor, at most


class CacheError(ValueError):
    """A cache that holds other activations than the run asks for."""


class Cache:
    """A folder of cached buffers, at most `gigabytes` (10⁹ bytes) large.

    `facts` identify the activations: JSON. A folder made with other facts is refused, except that
    it may hold more hookpoints than asked for.
    """

    def __init__(
        self, folder: Path, gigabytes: float, facts: Mapping[str, Any], context: int
    ) -> None:
        self.folder, self.limit, self.context = folder, int(gigabytes * 1e9), context
        self.names = list(facts["hookpoints"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FACTS
        if path.exists():
            _check_facts(json.loads(path.read_text(encoding="utf-8")), facts, folder)
        else:
            write_atomically(path, json.dumps(facts, indent=2).encode())
        self.full = False

    def get(self, number: int, lanes: range) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of those lanes, rows in the order of the stream, and the state of the rows
        after them; None if the buffer is not there or damaged."""
        manifest = self._manifest(number)
        if manifest is None:
            return None
        parts = []
        for lane in lanes:
            path = self._path(number, lane)
            said = manifest["files"][path.name]
            if (
                not path.exists()
                or path.stat().st_size != said["bytes"]
                or sha256(path) != said["sha256"]
            ):
                return None  # computed again, and overwritten
            parts.append(load_file(path))
        names = [
            name
            for name in parts[0]
            if name == "served" or name.removesuffix(".gradient") in self.names
        ]
        tensors = {name: _interleave([p[name] for p in parts], self.context) for name in names}
        return tensors, manifest["rows_after"]

    def put(
        self,
        number: int,
        lanes: range,
        tensors: Mapping[str, Tensor],
        after: Mapping[str, Any],
        mesh: Mesh,
    ) -> None:
        """Write the lanes of a buffer, if it fits. Every rank has to call it."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        size += HEADER * len(lanes) * len(tensors)
        self.full = self.full or self.bytes(but=number) + size * mesh.replicas > self.limit
        if mesh.any(self.full):
            self.full = True
            return
        try:
            mine = self._write(number, lanes, tensors) if mesh.shard == 0 else {}
        except (OSError, SafetensorError) as error:
            if not _no_space(error):
                raise
            self.full = True
        if mesh.any(self.full):
            self.full = True
            return
        files = mine
        if mesh.world > 1:
            everyone: list[Any] = [None] * mesh.world
            dist.all_gather_object(everyone, mine)
            files = {name: said for one in everyone for name, said in one.items()}
        if mesh.is_first:
            manifest = {"files": files, "rows_after": after}
            write_atomically(self.folder / f"{number:06d}.json", sealed(manifest))
        mesh.wait()

    def bytes(self, but: int | None = None) -> int:
        """What the folder holds, without the buffer `but`."""
        left_out = "" if but is None else f"{but:06d}-"
        files = self.folder.glob("*.safetensors")
        return sum(p.stat().st_size for p in files if not left_out or left_out not in p.name)

    def _write(
        self, number: int, lanes: range, tensors: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Any]]:
        """One file a lane; what the manifest says of them."""
        found = {}
        for i, lane in enumerate(lanes):
            part = {name: _lane(t, i, len(lanes), self.context) for name, t in tensors.items()}
            path = self._path(number, lane)
            partial = path.with_suffix(".partial")
            try:
                save_file(part, partial)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            os.replace(partial, path)
            found[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        return found

    def _manifest(self, number: int) -> dict[str, Any] | None:
        path = self.folder / f"{number:06d}.json"
        return unsealed(path.read_bytes()) if path.exists() else None

    def _path(self, number: int, lane: int) -> Path:
        return self.folder / f"{number:06d}-lane{lane}.safetensors"


def sha256(path: Path) -> str:
    """The checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of itself: a wrong position of the rows would change all that follows,
    and nobody would see it."""
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, "seal": _seal(plain)}).encode()


def unsealed(data: bytes) -> dict[str, Any] | None:
    """What `sealed` was given, or None if that is not what it wrote."""
    try:
        found: Any = json.loads(data)
    except ValueError:  # no JSON, or not even text
        return None
    if not isinstance(found, dict) or found.pop("seal", None) != _seal(found):
        return None
    return found


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _no_space(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    # safetensors has an error of its own, which gives the number in its text only
    said = any(f"(os error {number})" in str(error) for number in numbers)
    return getattr(error, "errno", None) in numbers or said


def write_atomically(path: Path, content: bytes) -> None:
    """All or nothing, also when the machine stops in the middle."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _lane(t: Tensor, i: int, lanes: int, context: int) -> Tensor:
    """Tokens [rows · lanes · context, …] of the i-th lane: [rows · context, …]."""
    return t.view(-1, lanes, context, *t.shape[1:])[:, i].flatten(0, 1).contiguous().cpu()


def _interleave(parts: list[Tensor], context: int) -> Tensor:
    """The inverse of `_lane` for all lanes."""
    shaped = [p.view(-1, context, *p.shape[1:]) for p in parts]
    return torch.stack(shaped, 1).flatten(0, 2)


def _check_facts(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for key in sorted(set(found) | set(wanted)):
        if key == "hookpoints":
            missing = sorted(set(wanted[key]) - set(found.get(key, [])))
            if missing:
                raise CacheError(
                    f"cache {folder.name}: has no hookpoint {missing[0]}, only "
                    f"{', '.join(found.get(key, []))}; choose another folder"
                )
        elif found.get(key) != wanted.get(key):
            raise CacheError(
                f"cache {folder.name}: was made with {key} = {found.get(key)!r}, this run has "
                f"{wanted.get(key)!r}; choose another folder, or remove this one"
            )
