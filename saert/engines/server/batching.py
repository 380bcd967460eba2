"""Requests on a transformers model, batched as they come: `Batching`.

One thread owns the model. Each round it lets go of jobs that were cancelled, reads the prompts of
new ones (each by itself, some per round, so that those under way do not wait long), and makes one
pass of one token for every job under way. Their edits are rows of static tables.

Why not transformers' own continuous batching: it draws with one seed for all, has no room for a
decision between two tokens (a monitor that stops), tells which token is whose in private objects
only, and needs an attention of its own, which not every model has.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.engines.codes import Chunk
from saert.engines.directive import Attached, Directive
from saert.engines.server.engine import Busy, Closing, End, Job, Load, Sink, Step, check_fits
from saert.engines.server.monitors import alarms, readings
from saert.engines.server.padded import Padded
from saert.engines.server.passes import Passes
from saert.engines.server.sampling import draw, generator, logprobs_of
from saert.sae import SAE

PROMPT_TOKENS = 512  # of new jobs that one round reads, unless the first alone has more
log = logging.getLogger("saert.serve")


@dataclass(eq=False)
class _Run:
    """A job under way; `token` is the last one drawn, which the next pass reads."""

    name: str
    job: Job
    sink: Sink
    row: int
    generator: torch.Generator
    token: int = -1
    drawn: int = 0

    @property
    def directive(self) -> Directive | None:
        return None if self.job.directive.empty else self.job.directive


class Batching:
    """An `Engine` on a causal language model of transformers, with SAEs on it.

    Args:
        model, saes, attached: as for `Passes`.
        streams: jobs that run at a time; waiting: that may wait beside them.

    Raises ValueError: an SAE that does not fit, a hookpoint or a model that cannot be served.
    """

    def __init__(
        self,
        model: Any,
        saes: Mapping[str, SAE],
        attached: Mapping[str, Attached],
        *,
        streams: int = 64,
        waiting: int = 256,
    ) -> None:
        self.attached, self.streams, self.waiting = attached, streams, waiting
        self._passes = Passes(model, saes, attached, rows=streams + 1)
        self._free = list(range(streams, 0, -1))  # rows of the tables
        self._padded = Padded()
        self._runs: list[_Run] = []  # in the order of the cache's rows
        self._queue: OrderedDict[str, tuple[Job, Sink]] = OrderedDict()
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="saert-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------

    @property
    def context(self) -> int:
        """How many tokens a job may have, prompt and all."""
        return self._passes.context

    def submit(self, job: Job, sink: Sink) -> str:
        """Queue a job, as `Engine.submit`. ValueError for one that does not fit the model."""
        check_fits(job, self.context, self._passes.vocabulary)
        name = job.directive.key or uuid.uuid4().hex
        with self._changed:
            if self._closing:
                raise Closing("the server is shutting down")
            if len(self._runs) + len(self._queue) >= self.streams + self.waiting:
                raise Busy(f"{len(self._runs)} requests run and {len(self._queue)} wait already")
            self._queue[name] = job, sink
            self._changed.notify_all()
        return name

    def cancel(self, name: str) -> None:
        """Let go of a job."""
        with self._changed:
            waiting = self._queue.pop(name, None)
            if waiting is None and any(run.name == name for run in self._runs):
                self._cancelled.add(name)
        if waiting is not None:
            waiting[1](End("cancelled"))

    def load(self) -> Load:
        """How busy it is."""
        with self._changed:
            return Load(len(self._runs), len(self._queue), self.streams - len(self._free))

    def alive(self) -> bool:
        """Whether it can still take jobs."""
        return not self._closing and self._thread.is_alive()

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, wait for those there are, end the rest, and free the model."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not (self._runs or self._queue), timeout=grace)
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    # -- the thread ----------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while self._wait():
                self._round()
        finally:
            with self._changed:
                self._closing = True
                left = [*(run.sink for run in self._runs), *(s for _, s in self._queue.values())]
                self._runs, self._padded = [], Padded()
                self._queue.clear()
            for sink in left:
                sink(End("cancelled", "the server is shutting down"))
            self._passes.close()

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._runs or self._queue)
            return not self._stopped

    def _round(self) -> None:
        gone = [run for run in self._runs if run.name in self._cancelled]
        self._drop(dict.fromkeys(gone, End("cancelled")))
        self._admit()
        try:
            if self._runs:
                self._pass()
        except Exception as error:  # out of memory, say: whose fault it is, is not known
            log.exception("a pass failed", extra={"facts": {"requests": len(self._runs)}})
            self._passes.codes.drain()
            self._padded.keep([])
            self._drop(dict.fromkeys(self._runs, _failed(error)))
        if not self._runs:
            self._passes.clear_all()
        with self._changed:
            self._changed.notify_all()

    def _admit(self) -> None:
        """Read the prompts of some of those who wait."""
        read = 0
        joining: list[tuple[_Run, Any]] = []
        while self._free and read < PROMPT_TOKENS:
            with self._changed:
                if not self._queue:
                    break
                name, (job, sink) = self._queue.popitem(last=False)
                source = generator(job.sampling.seed, self._passes.device)
                run = _Run(name, job, sink, self._free.pop(), source)
                self._runs.append(run)  # so that a cancellation finds it
            read += len(job.prompt)
            cache = self._begin(run)
            if cache is not None:
                joining.append((run, cache))
        self._padded.join([(cache, len(run.job.prompt)) for run, cache in joining])

    def _begin(self, run: _Run) -> Any:
        """Read a prompt and draw the first token: the cache, or None if that was all."""
        cache = None
        try:
            self._passes.write(run.row, run.job.directive, len(run.job.prompt))
            logits, cache = self._passes.prompt(run.job.prompt, run.row, run.directive)
            end = self._tell([run], logits).get(run)
        except Exception as error:
            log.exception("a prompt failed", extra={"facts": {"tokens": len(run.job.prompt)}})
            self._passes.codes.drain()
            end = _failed(error)
        if end is None:
            return cache
        with self._changed:
            self._runs.remove(run)
        self._release(run, end)
        return None

    def _pass(self) -> None:
        """One token for everybody."""
        runs = list(self._runs)
        logits = self._passes.token(
            [run.token for run in runs],
            self._padded,
            [run.row for run in runs],
            [run.directive for run in runs],
        )
        self._drop(self._tell(runs, logits))

    def _tell(self, runs: Sequence[_Run], logits: Tensor) -> dict[_Run, End]:
        """Draw a token for each run, of logits [runs, vocabulary], and say so; those that end."""
        codes = self._passes.codes.drain()
        fit = (logits.isfinite().any(-1) & ~logits.isnan().any(-1)).tolist()
        how, sources = [run.job.sampling for run in runs], [run.generator for run in runs]
        tokens = draw(logits if all(fit) else logits.nan_to_num(), how, sources)
        told = (
            self._tell_one(run, codes.get(run.name, {}), tokens[i], logits[i] if fit[i] else None)
            for i, run in enumerate(runs)
        )
        return {run: end for run, end in zip(runs, told, strict=True) if end is not None}

    def _tell_one(
        self, run: _Run, chunks: Mapping[str, Chunk], token: int, logits: Tensor | None
    ) -> End | None:
        job, prompt = run.job, len(run.job.prompt)
        went_off = alarms(job.monitors, chunks, prompt)
        seen = readings(job.wanted, chunks, prompt)
        if any(alarm.monitor.action == "stop" for alarm in went_off):
            run.sink(Step(None, None, (), went_off, seen))
            return End("monitor")
        if logits is None:
            return End("error", "the model's output is not finite; are the edits too strong?")
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if job.sampling.logprobs is not None:
            logprob, top = logprobs_of(logits, token, job.sampling.logprobs)
        run.token, run.drawn = token, run.drawn + 1
        run.sink(Step(token, logprob, top, went_off, seen))
        if token in job.stops:
            return End("stop")
        return End("length") if run.drawn >= job.sampling.max_tokens else None

    def _drop(self, ends: Mapping[_Run, End]) -> None:
        """End jobs that run, and free their rows."""
        if not ends:
            return
        if self._padded.lengths:
            self._padded.keep([i for i, run in enumerate(self._runs) if run not in ends])
        with self._changed:
            self._runs = [run for run in self._runs if run not in ends]
        for run, end in ends.items():
            self._release(run, end)

    def _release(self, run: _Run, end: End) -> None:
        self._passes.clear(run.row, run.job.directive)
        with self._changed:
            self._free.append(run.row)
            self._cancelled.discard(run.name)
        run.sink(end)


def _failed(error: Exception) -> End:
    return End("error", f"the model failed: {type(error).__name__}")
