"""A process that loads a checkpoint in one library's way, each time it is asked to.

    python benchmarks/_load_worker.py saert FOLDER

It answers one JSON object a line: first the peak of resident memory that a load needs on top of
what is there before it (imports and a tiny load included), then the seconds of every load that a
line on standard input asks for. What was loaded is dropped, outside of the time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Load = Callable[[Path], object]


def loader(kind: str) -> Load:
    """What `kind` calls loading a folder; imports what it needs.

    "…, bfloat16": into that dtype. "…, copied": and copied out of the file, which SAELens maps and
    does not read: without that, whoever writes to the file writes to the weights.
    """
    name, _, how = kind.partition(", ")
    if name == "read":
        return lambda folder: weights(folder).read_bytes()
    if name == "saert":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import torch

        from saert import load

        return lambda folder: load(folder, dtype=torch.bfloat16 if how else None)
    if name == "SAELens":
        from sae_lens import SAE

        if how == "copied":
            return lambda folder: [one.clone() for one in SAE.load_from_disk(folder).parameters()]
        return lambda folder: SAE.load_from_disk(folder, dtype=how or None)
    if name == "sparsify":
        from sparsify import SparseCoder

        return lambda folder: SparseCoder.load_from_disk(folder)
    raise ValueError(f"{kind!r}, expected read, saert, SAELens or sparsify")


def weights(folder: Path) -> Path:
    return max(
        (one for one in folder.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size
    )


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) in bytes; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main(kind: str, folder: Path, tiny: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print while they are imported
    load = loader(kind)
    load(tiny)
    before = resident("VmRSS")
    loaded = load(folder)
    answer = {"peak": resident("VmHWM") - before, "size": weights(folder).stat().st_size}
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        del loaded
        if not sys.stdin.readline():
            return
        begun = time.perf_counter()
        loaded = load(folder)
        answer = {"seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's kernels.py would hide Hugging Face's package
    main(sys.argv[1], *map(Path, sys.argv[2:]))
