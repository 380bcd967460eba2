"""A suite of probing tasks: one TOML file, one table of results, resumable task by task."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saert.measure.identity import model_identity, sae_identity
from saert.measure.probes.pooling import pooled
from saert.measure.probes.probing import Select, sparse_probe
from saert.measure.probes.results import Probe, Probes
from saert.measure.probes.tasks import Task, TaskFile, nearest, task_file
from saert.sae import SAE


@dataclass(frozen=True)
class Suite:
    """Tasks that are run together: `read_suite` makes one from a TOML file.

    Attributes:
        name: of the suite.
        tasks: how to read each.
        context: tokens of a text that are read at most; None: what the model holds.
    """

    name: str
    tasks: tuple[TaskFile, ...]
    context: int | None = None


def read_suite(path: str | Path, data: str | Path | None = None) -> Suite:
    """Read and check a suite: `name`, `context`, and a [[task]] for each (see `TaskFile`).

    Relative files are looked up in `data`, by default the suite's own folder. Raises ValueError
    naming the task and the key, or FileNotFoundError.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not TOML: {error}") from None
    for key in table:
        if key not in ("name", "context", "task"):
            hint = nearest(key, ["name", "context", "task"])
            raise ValueError(f"{path.name}: unknown key {key!r}{hint}")
    entries = table.get("task", [])
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path.name}: no [[task]]")
    context = table.get("context")
    if context is not None and (not isinstance(context, int) or context < 1):
        raise ValueError(f"{path.name}: context is {context!r}, expected a number of tokens")
    tasks = tuple(task_file(entry, Path(data or path.parent)) for entry in entries)
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path.name}: several tasks are called {', '.join(sorted(twice))}")
    return Suite(str(table.get("name", path.stem)), tasks, context)


def probe_task(
    model: Any,
    tokenizer: Any,
    sae: SAE,
    task: Task,
    *,
    ks: Sequence[int] = (),
    select: Select = "loss",
    dense: bool = False,
    ridge: float = 1e-6,
    context: int | None = None,
    batch: int = 16,
    progress: bool = False,
) -> Probes:
    """Read a task's texts, pool, and probe every latent: see `pooled` and `sparse_probe`.

    Examples without a token (an empty text, or a word past the context) are left out; each
    result's `skipped` counts them.
    """
    found = pooled(
        model, tokenizer, sae, task.texts, pool=task.pool, text_of=task.text_of, spans=task.spans,
        context=context, batch=batch, progress=progress, name=task.name,
    )  # fmt: skip
    kept = found.tokens > 0
    probes = sparse_probe(
        found.columns.select(kept),
        [label for label, keep in zip(task.labels, kept.tolist(), strict=True) if keep],
        train=task.train[kept],
        positive=task.positive or None,
        ks=ks,
        select=select,
        dense=found.dense[kept] if dense else None,
        ridge=ridge,
        name=task.name,
        progress=progress,
    )
    skipped = int((~kept).sum())
    return replace(probes, probes=tuple(replace(probe, skipped=skipped) for probe in probes))


def probe_suite(
    model: Any,
    tokenizer: Any,
    sae: SAE,
    suite: Suite,
    *,
    ks: Sequence[int] = (),
    select: Select = "loss",
    dense: bool = False,
    ridge: float = 1e-6,
    batch: int = 16,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Probes:
    """All tasks of a suite.

    With `folder` every task's results are written there when it is done, and read back by the
    next run if task, data, model, SAE and settings are the same. Raises ValueError for a file of
    that name that `probe_suite` did not write.
    """
    how: dict[str, Any] = {"ks": list(ks), "select": select, "dense": dense, "ridge": ridge}
    found: list[Probe] = []
    left_out: list[str] = []
    who = {} if folder is None else _who(model, sae)
    for task in suite.tasks:
        key, path = "", None
        if folder is not None:
            path = Path(folder) / f"{task.name}.json"
            key = _key(task, suite.context, how, who)
            if (done := _done(path, key)) is not None:
                found += done
                left_out += done.left_out
                continue
        probes = probe_task(
            model, tokenizer, sae, task.load(), context=suite.context, batch=batch,
            progress=progress, **how,
        )  # fmt: skip
        found += [replace(probe, fits=None) for probe in probes]
        left_out += probes.left_out
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [probe.as_dict() for probe in probes]
            answer = {"key": key, "probes": rows, "left_out": probes.left_out}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
    return Probes(tuple(found), tuple(left_out))


def _who(model: Any, sae: SAE) -> dict[str, Any]:
    """Fingerprints of both, and the hookpoint: an SAE may be read elsewhere with equal weights."""
    return {"model": model_identity(model, sae)["fingerprint"], "sae": sae_identity(sae)}


def _key(task: TaskFile, context: int | None, how: dict[str, Any], who: Any) -> str:
    """What decides a task's results."""
    data = hashlib.sha256(task.file.read_bytes()).hexdigest()
    parts = {**vars(task), "file": data, "context": context, **how, "who": who}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _done(path: Path, key: str) -> Probes | None:
    """What an earlier run wrote, or None where it ran on something else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        probes = tuple(Probe.from_dict(one) for one in found["probes"])
        return Probes(probes, tuple(found["left_out"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} would get a task's results, but holds something else: move it, or choose "
            "another folder"
        ) from None
