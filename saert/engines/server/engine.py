"""What the server asks of an engine: take a job, tell of every token, let go of it at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from saert.engines.directive import Attached, Directive
from saert.engines.server.monitors import Alarm, Monitor, Reading, Wanted

Reason = Literal["stop", "length", "monitor", "cancelled", "error"]


class Busy(RuntimeError):
    """No room for another job now: later there may be."""


class Closing(RuntimeError):
    """The engine takes no more jobs: it is being shut down."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_tokens: at most so many.
        temperature: 0 takes the likeliest.
        top_p: the likeliest tokens whose probabilities sum to it are drawn from.
        seed: the same draws for the same seed, whoever else is served; None: other draws each time.
        logprobs: how many alternatives are told with each token; None: not even its own.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Job:
    """One request as an engine takes it.

    Attributes:
        prompt: token ids, at least one.
        directive: its edits and splices, every SAE named by its hookpoint. Its `codes` name the
            SAEs that `monitors` and `wanted` read, its `key` is this job's alone.
        stops: the ids that end it.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    directive: Directive = field(default_factory=Directive)
    monitors: tuple[Monitor, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    stops: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Step:
    """One pass of the model, as it concerns one job.

    Attributes:
        token: what it drew; None if a monitor stopped it instead.
        logprob, top: the token's log-probability and (token, log-probability) of the likeliest, of
            the model itself (temperature 1); None and () unless asked for.
        alarms, readings: of the tokens that the pass read: the prompt, or the token before.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    alarms: tuple[Alarm, ...] = ()
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class End:
    """The last that is heard of a job."""

    reason: Reason
    message: str = ""


def check_fits(job: Job, context: int, vocabulary: int) -> None:
    """Raise ValueError for a job that a model cannot take: before it takes others down with it."""
    read, asked = len(job.prompt), job.sampling.max_tokens
    if not read:
        raise ValueError("the prompt has no tokens")
    if read + asked > context:
        raise ValueError(
            f"the prompt has {read} tokens and {asked} more were asked for; the model holds "
            f"{context}"
        )
    if max(job.prompt) >= vocabulary:
        raise ValueError(f"the prompt has token {max(job.prompt)}; the model has {vocabulary}")


Sink = Callable[[Step | End], None]
"""Hears of a job, from the engine's thread; it must not block or raise."""


@dataclass(frozen=True)
class Load:
    """How busy an engine is: jobs that run, jobs that wait, rows of edit tables in use."""

    running: int
    waiting: int
    rows: int


class Engine(Protocol):
    """Attributes: `attached`, the SAEs by hookpoint; `context`, how many tokens a job may have."""

    @property
    def attached(self) -> Mapping[str, Attached]: ...

    @property
    def context(self) -> int: ...

    def submit(self, job: Job, sink: Sink) -> str:
        """Queue a job; its name for `cancel`. Raises Busy, Closing."""

    def cancel(self, name: str) -> None:
        """Let go of a job, at once and from any thread; nothing happens if it is over."""

    def load(self) -> Load: ...

    def alive(self) -> bool:
        """Whether it can still take jobs."""

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, wait `grace` seconds for those there are, end them, and stop."""
