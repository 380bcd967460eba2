"""Train dictionaries, all on one stream of activations, from a checkpoint if there is one.

Objectives differ in their loss and share everything else: the stream, the units, the optimiser, the
checkpoints. Any number of jobs train at once on the same batches, so they can be compared.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.train import checkpoint
from saert.train.export import to_sae
from saert.train.initialise import new_dictionary, start_from
from saert.train.mesh import Mesh
from saert.train.objectives.base import Batch, Objective
from saert.train.stream import Served
from saert.train.training import OptimiserConfig, Training
from saert.train.units import Units

SAMPLE = 32_768  # tokens that initialise and calibrate (Gao et al. 2024)
DIVERGED = 200  # steps in a row above an FVU of 1.5, getting no better
NOTHING = Objective.calibrate


class TrainingError(RuntimeError):
    """The run cannot go on; its last checkpoint is good."""


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal after saving; the same command goes on from there."""


@dataclass(frozen=True)
class Job:
    """One dictionary to train: what it reads, what it writes (None: the same), and how."""

    name: str
    hookpoint: Hookpoint
    target: Hookpoint | None
    num_latents: int
    objective: Objective
    seed: int = 0
    skip: bool = False
    normalise: str = "auto"
    start: SAE | None = None  # weights to go on from, instead of new ones


@dataclass(frozen=True)
class Plan:
    """How long, how exactly, and how often to save."""

    steps: int
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    tf32: bool = False
    device: str | None = None  # of the dictionaries; None: where the activations are
    save_every: int = 500
    keep: int = 2


class Stream(Protocol):
    """`ActivationStream` or `RowStream`."""

    def next(self) -> Served: ...
    def sample(self, tokens: int) -> dict[Hookpoint, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Member:
    """A job under way."""

    job: Job
    units: Units
    training: Training

    def batch(self, served: Served, mesh: Mesh, dtype: torch.dtype) -> Batch:
        """The served tokens as this job sees them."""
        read, write = self.job.hookpoint, self.job.target or self.job.hookpoint
        device = self.training.dictionary.W_enc.device
        raw = served.x[read].to(device, dtype)
        target = None if self.job.target is None else served.x[write].to(device, dtype)
        x, y = self.units.enter(raw, target)
        more: dict[str, Any] = {}
        if self.job.objective.wants == "gradient":
            gradient = served.gradient[write].to(device, dtype)
            more["gradient"] = self.units.enter_gradient(gradient, raw)
        if self.job.objective.wants == "downstream":
            splice = served.downstream
            assert splice is not None
            more["downstream"] = lambda estimate: splice(write, self.units.leave(estimate, raw))
        return Batch.of(x, y, mesh, **more)

    def sae(self, metadata: Mapping[str, Any] | None = None) -> SAE:
        """The SAE as it would be published now. Every rank has to call it."""
        return to_sae(self.training, self.units, self.job.hookpoint, self.job.target, metadata)


class Run:
    """Jobs, their stream, and the step that comes next."""

    def __init__(
        self, jobs: Sequence[Job], stream: Stream, plan: Plan, folder: Path | None, mesh: Mesh
    ) -> None:
        """Starts from the newest checkpoint in `folder`, or from a sample of the stream.

        Raises CheckpointError if the newest checkpoint belongs to other jobs.
        """
        self.plan, self.stream, self.folder, self.mesh = plan, stream, folder, mesh
        self.step, self.losing, self.best = 0, 0, math.inf
        found = checkpoint.checkpoints(folder) if folder is not None else []
        state = checkpoint.read_state(found[-1]) if found else None
        self.won = state is not None  # whether it was ever not losing
        if state is not None:
            stream.load_state_dict(state["stream"])
        sample = stream.sample(SAMPLE)
        self.members = [
            self._member(job, sample, None if state is None else state["units"].get(job.name))
            for job in jobs
        ]
        if state is not None:
            checkpoint.load(found[-1], self._tensors(), mesh)
            self.step = state["step"]
            for member in self.members:
                member.training.updates = self.step

    def _member(self, job: Job, sample: Mapping[Hookpoint, Tensor], units: Any) -> Member:
        device, dtype = self.plan.device, self.plan.dtype
        x = sample[job.hookpoint].to(device=device, dtype=dtype)
        y = sample[job.target or job.hookpoint].to(device=device, dtype=dtype)
        transcodes = job.target is not None
        if units is None:
            kind = job.objective.normalise if job.normalise == "auto" else job.normalise
            found = Units.of(kind, x, y, transcodes)
        else:
            found = Units(**units)
        x, y = found.enter(x, y if transcodes else None)
        dictionary = new_dictionary(
            x, y, job.num_latents, job.objective, self.mesh,
            seed=job.seed, transcodes=transcodes, skip=job.skip, compute=self.plan.compute,
        )  # fmt: skip
        if job.start is not None:
            start_from(dictionary, job.start, found)
        own = slice(self.mesh.replica, None, self.mesh.replicas)
        even = len(x) // self.mesh.replicas * self.mesh.replicas
        job.objective.prepare(dictionary, Batch.of(x[:even][own], y[:even][own], self.mesh))
        if job.start is not None:
            job.objective.adopt(dictionary, found.unfold_activation(job.start.activation))
        training = Training(
            dictionary, job.objective, self.plan.optimiser, self.plan.steps, job.seed
        )
        return Member(job, found, training)

    # -- running -----------------------------------------------------------------------------------

    def train(
        self,
        report: Callable[[int, dict[str, dict[str, float]]], None] | None = None,
        until: int | None = None,
    ) -> None:
        """Go on to step `until` (default: the last), saving as the plan says.

        Raises TrainingError for NaN or divergence, Interrupted after SIGINT or SIGTERM.
        """
        last = self.plan.steps if until is None else min(until, self.plan.steps)
        with _signals() as asked:
            while self.step < last:
                logs = self._advance()
                self._check(logs)
                self.step += 1
                if report is not None:
                    report(self.step, logs)
                stop = self.mesh.any(asked.is_set())
                # a run that begins to diverge keeps its checkpoints from before
                due = self.step % self.plan.save_every == 0 and not (self.losing and self.won)
                if stop or due or self.step == last:
                    self.save()
                if stop:
                    raise Interrupted(f"stopped after step {self.step}, saved; run again to go on")

    def _advance(self) -> dict[str, dict[str, float]]:
        served = self.stream.next()
        logs = {}
        for member in self.members:
            batch = member.batch(served, self.mesh, self.plan.dtype)
            try:
                with _tf32(self.plan.tf32):
                    found = member.training.step(batch, self.step)
            except FloatingPointError as error:
                raise TrainingError(self._lost(member, str(error))) from error
            logs[member.job.name] = {name: value.item() for name, value in found.items()}
        return logs

    def _check(self, logs: Mapping[str, Mapping[str, float]]) -> None:
        for member in self.members:
            for name, value in logs[member.job.name].items():
                if not math.isfinite(value):
                    raise TrainingError(self._lost(member, f"{name} is {value}"))
        worst = max(log["fvu"] for log in logs.values())
        self.losing = self.losing + 1 if worst > 1.5 and worst >= self.best else 0
        self.best = min(self.best, worst)
        self.won = self.won or worst <= 1.5
        if self.losing >= DIVERGED:
            raise TrainingError(
                f"step {self.step}: the fraction of variance unexplained was above 1.5 for "
                f"{DIVERGED} steps without getting better (now {worst:.3g}): training diverges; "
                f"{self._left()}. Lower the learning rate, raise warmup or set clip"
            )

    def _lost(self, member: Member, what: str) -> str:
        return (
            f"step {self.step}, {member.job.name}: {what}; {self._left()}. Lower the learning "
            "rate, set clip, or look for NaN and inf in the model's activations"
        )

    def _left(self) -> str:
        found = checkpoint.checkpoints(self.folder) if self.folder is not None else []
        return (
            f"the last good checkpoint is {found[-1].name}" if found else "there is no checkpoint"
        )

    def calibrate(self) -> None:
        """After the last step: the weights that are published, and what their activations need and
        training did not give."""
        for member in self.members:
            member.training.finish()
        self._calibrate()

    def _calibrate(self) -> None:
        asking = [m for m in self.members if type(m.job.objective).calibrate is not NOTHING]
        if not asking:
            return
        sample = self.stream.sample(SAMPLE)
        even = min(map(len, sample.values())) // self.mesh.replicas
        part = slice(self.mesh.replica * even, (self.mesh.replica + 1) * even)
        served = Served({site: x[part] for site, x in sample.items()})
        for member in asking:
            batch = member.batch(served, self.mesh, self.plan.dtype)
            member.job.objective.calibrate(member.training.dictionary, batch)

    def saes(self) -> dict[str, SAE]:
        """Every SAE as it would be published now, by its job's name. Every rank has to call it."""
        self._calibrate()
        return {member.job.name: member.sae() for member in self.members}

    # -- saving ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder."""
        if self.folder is None:
            return
        state = {
            "stream": self.stream.state_dict(),
            "units": {m.job.name: asdict(m.units) for m in self.members},
        }
        tensors = self._tensors()
        checkpoint.save(self.folder, self.step, tensors, state, self.mesh, self.plan.keep)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{member.job.name}/{name}": t
            for member in self.members
            for name, t in member.training.state_dict().items()
        }


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let dense products of a training step use TF32, and nothing else: not the language model."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal does what it always did."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
