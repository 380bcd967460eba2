"""`saert scale`: train dictionaries of several sizes on the same batches, and fit how loss falls.

    FOLDER/sweep.json    what was swept
           cache/        activations, shared by all runs (removed at the end, unless asked to stay)
           part-00/…     checkpoints of the dictionaries that train together, and their curves
           points.json fits.json compute.png latents-k32.png joint.png

Some dictionaries train at once, as many as `at_once` says; the next ones read the same activations
from the cache. The same command goes on with a stopped sweep.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.measure.reports.reconstruction import Unexplained
from saert.sae import SAE
from saert.train import scaling, scaling_plots
from saert.train.cache import write_atomically
from saert.train.config import ConfigError, TrainConfig
from saert.train.run import Job, Member, Run
from saert.train.scaling import Fit, Point
from saert.train.session import Session

CURVE = 12  # points of a training curve, evenly spaced in the logarithm of the tokens


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found: all points of all curves, and the laws that could be fitted.

    `refusals` say why a law is missing."""

    points: list[Point]
    fits: dict[str, Fit[Any]]
    refusals: dict[str, str]


def sweep(
    config: TrainConfig,
    folder: Path,
    num_latents: Sequence[int],
    ks: Sequence[int],
    *,
    device: str = "cpu",
    cache_gb: float = 10.0,
    keep_cache: bool = False,
    at_once: int = 6,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Sweep:
    """Train every (num_latents, k) on `config`, in one process, and fit L(C), L(N) and L(n, k).

    Raises ConfigError if the configuration has several hookpoints, an objective without k, no
    held-out text, or if the folder holds another sweep.
    """
    (read, write), pairs = _only(config), [(n, k) for k in ks for n in num_latents if k <= n]
    _check_folder(folder, config, pairs)
    parts = [pairs[i : i + at_once] for i in range(0, len(pairs), at_once)]
    cache = folder / "cache" if len(parts) > 1 or keep_cache else None
    session = Session(config, device=device, cache=cache, cache_gb=cache_gb)
    held_out = _HeldOut(session, read, write)
    points: list[Point] = []
    with Progress(disable=not progress) as bar:
        task = bar.add_task("sweep", total=config.steps * len(parts))
        for number, part in enumerate(parts):
            done = config.steps * number
            points += _train_part(
                session,
                [_job(config, read, write, n, k) for n, k in part],
                folder / f"part-{number:02d}",
                held_out,
                lambda step, done=done: bar.update(task, completed=done + step),  # type: ignore[misc]
            )
    scaling.save_points(folder / "points.json", points)
    found = fit(points)
    _write(found, folder)
    if cache is not None and not keep_cache:
        shutil.rmtree(cache, ignore_errors=True)
    for name, why in found.refusals.items():
        say(f"{name}: not fitted: {why}")
    return found


def fit(points: Sequence[Point]) -> Sweep:
    """The laws that these points can carry; the last point of each curve counts as converged."""
    last: dict[tuple[int, int], Point] = {}
    for point in sorted(points, key=lambda p: p.tokens):
        last[point.num_latents, point.k] = point
    final = list(last.values())
    unit = 10.0 ** math.floor(math.log10(max(p.flops for p in points)))
    asked: dict[str, Callable[[], Fit[Any]]] = {
        "compute": lambda: scaling.fit_compute(points, unit=unit),
        "joint": lambda: scaling.fit_joint(final),
    }
    for k in sorted({p.k for p in final}):
        same = [p for p in final if p.k == k]
        asked[f"latents-k{k}"] = lambda same=same: scaling.fit_latents(same)  # type: ignore[misc]
    fits, refusals = dict[str, Fit[Any]](), dict[str, str]()
    for name, ask in asked.items():
        try:
            fits[name] = ask()
        except ValueError as error:
            refusals[name] = str(error)
    return Sweep(list(points), fits, refusals)


class _HeldOut:
    """Activations that no dictionary trains on, and the FVU on them."""

    def __init__(self, session: Session, read: Hookpoint, write: Hookpoint | None) -> None:
        rows = session.heldout
        if rows is None:
            raise ConfigError("a sweep needs held-out text: set data.holdout above 0")
        sites = list(dict.fromkeys((read, write or read)))
        rows_at_once = session.config.stream.forward_rows
        found = capture(session.model, rows.to(session.device), sites, rows_at_once)
        used = torch.ones_like(rows, dtype=torch.bool)
        if session.config.stream.exclude_special:
            used = ~session.special(rows)
        mask = used.flatten()
        self.x, self.y = (found[site].cpu()[mask] for site in (read, write or read))

    def fvu(self, sae: SAE) -> float:
        unexplained = Unexplained()
        for x, y in zip(self.x.split(4096), self.y.split(4096), strict=True):
            unexplained.add(y, self._reconstruct(sae, x))
        return unexplained.fvu

    @torch.no_grad()
    def _reconstruct(self, sae: SAE, x: Tensor) -> Tensor:
        reconstruction: Tensor = sae(x.to(sae.device)).cpu()
        return reconstruction


def _train_part(
    session: Session,
    jobs: list[Job],
    folder: Path,
    held_out: _HeldOut,
    moved: Callable[[int], None],
) -> list[Point]:
    """Train some dictionaries together, measuring them now and then; their points."""
    config, record = session.config, folder / "curves.json"
    curves: dict[str, list[Point]] = {}
    if record.exists():
        curves = {
            step: [Point(**p) for p in found]
            for step, found in json.loads(record.read_text(encoding="utf-8")).items()
        }
    moments = _moments(config.steps)
    if str(moments[-1]) not in curves:
        run = Run(jobs, session.stream(jobs), session.plan(), folder / "checkpoints", session.mesh)
        for moment in moments:
            if run.step < moment:
                run.train(lambda step, logs: moved(step), until=moment)
            if run.step == moment and str(moment) not in curves:
                curves[str(moment)] = [_point(m, moment, config, held_out) for m in run.members]
                plain = {step: [vars(p) for p in found] for step, found in curves.items()}
                write_atomically(record, json.dumps(plain).encode())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    moved(config.steps)
    return [point for found in curves.values() for point in found]


def _point(member: Member, step: int, config: TrainConfig, held_out: _HeldOut) -> Point:
    sae, tokens = member.sae(), step * config.stream.batch_tokens
    k = int(member.job.objective.k)  # type: ignore[attr-defined]
    flops = scaling.sae_flops(sae.d_in, sae.num_latents, k, tokens, sae.d_out)
    return Point(sae.num_latents, k, tokens, float(flops), held_out.fvu(sae))


def _moments(steps: int) -> list[int]:
    """Steps at which curves are measured: from a fiftieth of the run to its end."""
    spaced = torch.logspace(-1.7, 0, CURVE, dtype=torch.float64) * steps
    return sorted({max(1, round(step)) for step in spaced.tolist()})


def _job(config: TrainConfig, read: Hookpoint, write: Hookpoint | None, n: int, k: int) -> Job:
    objective = replace(config.objective, k=k)  # type: ignore[type-var]
    sae = config.sae
    return Job(
        f"n{n}-k{k}", read, write, n, objective, config.seed, sae.skip, normalise=sae.normalise
    )


def _only(config: TrainConfig) -> tuple[Hookpoint, Hookpoint | None]:
    pairs = config.sae.pairs()
    if len(pairs) != 1:
        raise ConfigError(f"a sweep has one hookpoint, found {len(pairs)}")
    if not hasattr(config.objective, "k"):
        raise ConfigError(f"a sweep over k needs an objective with k, not {config.objective.name}")
    return pairs[0]


def _check_folder(folder: Path, config: TrainConfig, pairs: list[tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.json"
    wanted = json.loads(json.dumps({"config": config.to_dict(), "pairs": pairs}))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != wanted:
        raise ConfigError(f"{folder} holds another sweep; choose another folder")
    write_atomically(path, json.dumps(wanted, indent=2).encode())


def _write(found: Sweep, folder: Path) -> None:
    content = {name: fit.to_dict() for name, fit in found.fits.items()}
    content |= {name: {"refused": why} for name, why in found.refusals.items()}
    write_atomically(folder / "fits.json", json.dumps(content, indent=2).encode())
    for name, law in found.fits.items():
        if name == "compute":
            scaling_plots.plot_compute(found.points, law, folder / name)
        elif name == "joint":
            scaling_plots.plot_joint(law.points, law, folder / name)
        else:
            scaling_plots.plot_latents(law.points, law, folder / name)
