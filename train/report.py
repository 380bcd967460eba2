"""Where a run's numbers go: a progress bar, `metrics.jsonl`, TensorBoard, Weights & Biases.

`metrics.jsonl` holds one JSON object per logged step and is the record that resumed runs continue:
what a stopped run had logged after its last checkpoint is cut off, and logged again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from saert.measure.reports.evaluate import Metrics
from saert.measure.reports.reconstruction import DENSITY_EDGES

LOG = "metrics.jsonl"
Logs = Mapping[str, Mapping[str, float]]


class _Speed(ProgressColumn):
    """Tokens per second, over the last minute or so."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("… tok/s" if speed is None else f"{speed:,.0f} tok/s", style="cyan")


class Report:
    """Takes a run's numbers. A context manager; only one process of a run opens it.

    Args:
        folder: gets metrics.jsonl and tensorboard/.
        total: tokens of the whole run; done: steps that a checkpoint already covers.
        every: log each `every`-th step.
        wandb: a project's name, to log there as well (the package has to be installed).
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        total: int,
        batch_tokens: int,
        done: int = 0,
        every: int = 10,
        progress: bool = True,
        tensorboard: bool = True,
        wandb: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.batch_tokens, self.every = batch_tokens, every
        self.path = folder / LOG
        _cut(self.path, done)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer = _tensorboard(folder / "tensorboard", done) if tensorboard else None
        self.wandb = _wandb(wandb, config, folder) if wandb else None
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _Speed(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            speed_estimate_period=60,
            disable=not progress,
        )
        done_tokens = done * batch_tokens
        self.task = self.bar.add_task("training", total=total, completed=done_tokens, note="")
        self.clock = (time.perf_counter(), done)

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, number: int, logs: Logs) -> None:
        """The numbers of the step that made `number` steps complete."""
        self.bar.advance(self.task, self.batch_tokens)
        if number % self.every and number != 1:
            return
        now, (then, before) = time.perf_counter(), self.clock
        self.clock = (now, number)
        speed = (number - before) * self.batch_tokens / max(1e-9, now - then)
        values = {f"{job}/{name}": v for job, log in logs.items() for name, v in log.items()}
        self._write(number, values | {"tokens_per_second": speed})
        self.bar.update(self.task, note=_note(logs))

    def evaluation(self, number: int, name: str, metrics: Metrics) -> None:
        """Held-out metrics of one dictionary after `number` steps."""
        found = asdict(metrics)
        density = found.pop("density")
        values = {f"{name}/heldout/{key}": value for key, value in found.items()}
        self._write(number, values)
        if self.writer is not None:
            self._histogram(f"{name}/heldout/log10 density", density, number)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self.bar.console.print(text, highlight=False)

    def _write(self, number: int, values: Mapping[str, float]) -> None:
        line = {"step": number, "tokens": number * self.batch_tokens, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, number)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=number)

    def _histogram(self, name: str, counts: tuple[int, ...], number: int) -> None:
        pairs = list(zip(DENSITY_EDGES, DENSITY_EDGES[1:], strict=False))
        centres = [(low + high) / 2 for low, high in pairs]
        used = [(c, n) for c, n in zip(centres, counts, strict=True) if n]
        if not used:
            return
        assert self.writer is not None
        self.writer.add_histogram_raw(
            name,
            min=used[0][0],
            max=used[-1][0],
            num=sum(counts),
            sum=sum(c * n for c, n in used),
            sum_squares=sum(c * c * n for c, n in used),
            bucket_limits=list(DENSITY_EDGES[1:]),
            bucket_counts=list(counts),
            global_step=number,
        )


def _note(logs: Logs) -> str:
    """Short: FVU, L0 and dead latents of the first few dictionaries."""
    shown = [
        f"{name} fvu {log['fvu']:.3f} L0 {log['l0']:.0f} dead {log['dead']:.0%}"
        for name, log in list(logs.items())[:3]
    ]
    more = f" +{len(logs) - 3}" if len(logs) > 3 else ""
    return "  ".join(shown) + more


def _cut(path: Path, step: int) -> None:
    """Drop what was logged after `step`, evaluations at it, which are made again, and a last line
    that was cut in the middle."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
            evaluated = any("/heldout/" in key for key in found)
            if found["step"] < step or (found["step"] == step and not evaluated):
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "TensorBoard is not installed: pip install 'saert[train]', or --no-tensorboard"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _wandb(project: str, config: Mapping[str, Any], folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError("Weights & Biases is not installed: pip install wandb") from None
    return wandb.init(
        project=project, config=dict(config), dir=str(folder), resume="allow", id=_id(folder)
    )


def _id(folder: Path) -> str:
    """The same run after a resume: an id kept in the folder."""
    path = folder / "wandb-id"
    if not path.exists():
        path.write_text(f"{time.time_ns():x}")
    return path.read_text()
