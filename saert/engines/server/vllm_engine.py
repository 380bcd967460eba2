"""Requests on vLLM: `VllmEngine`, an `AsyncLLM` on an event loop in a thread of its own.

vLLM batches, keeps the caches and draws; its workers hold the SAEs. What is left to do here: hand
it jobs from any thread, fetch the codes that monitors read, let go of whoever leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from saert.engines.directive import Attached
from saert.engines.server.engine import Busy, Closing, End, Job, Load, Sink, check_fits
from saert.engines.server.vllm_codes import Fetch, Packed
from saert.engines.server.vllm_steps import Steps

PATIENCE = 1.0  # seconds between looks whether a worker that does not answer still lives
log = logging.getLogger("saert.serve")


class VllmEngine:
    """An `Engine` on vLLM.

    Args:
        start: makes the `AsyncLLM`, on the event loop where it is to live.
        params: the `SamplingParams` of a job, of which every output is to tell the new tokens only.
        attached: the SAEs that its workers hold, by hookpoint.
        streams: jobs that vLLM runs at a time; waiting: that may wait beside them.

    Raises what `start` raises.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Any]],
        params: Callable[[Job], Any],
        attached: Mapping[str, Attached],
        *,
        streams: int = 64,
        waiting: int = 256,
    ) -> None:
        self.attached, self.streams, self.waiting = attached, streams, waiting
        self._params = params
        self._codes = Fetch(self._take)
        self._jobs: dict[str, Job] = {}  # until their `End`
        self._tasks: dict[str, asyncio.Task[End]] = {}  # the same, once the loop knows of them
        self._changed = threading.Condition()
        self._closing = False
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(start, started)), name="saert-vllm", daemon=True
        )
        self._thread.start()
        started.result()

    # -- from any thread -----------------------------------------------------------------------

    @property
    def context(self) -> int:
        """How many tokens a job may have, prompt and all."""
        return int(self._llm.model_config.max_model_len)

    def submit(self, job: Job, sink: Sink) -> str:
        """Queue a job, as `Engine.submit`. ValueError for one that does not fit the model."""
        check_fits(job, self.context, self._llm.model_config.get_vocab_size())
        name = job.directive.key or uuid.uuid4().hex
        with self._changed:
            if self._closing:
                raise Closing("the server is shutting down")
            if not self.alive():
                raise Closing("vLLM has died; the server has to be started again")
            if len(self._jobs) >= self.streams + self.waiting:
                raise Busy(f"{len(self._jobs)} requests run or wait already")
            self._jobs[name] = job
            self._loop.call_soon_threadsafe(self._begin, name, job, sink)
        return name

    def cancel(self, name: str) -> None:
        """Let go of a job."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing runs
            self._loop.call_soon_threadsafe(self._let_go, name)

    def load(self) -> Load:
        """How busy it is."""
        with self._changed:
            jobs = list(self._jobs.values())
        running = min(len(jobs), self.streams)
        rows = min(sum(not job.directive.empty for job in jobs), running)
        return Load(running, len(jobs) - running, rows)

    def alive(self) -> bool:
        """Whether it can still take jobs: not once a process of vLLM has died."""
        return not self._closing and self._thread.is_alive() and not self._llm.errored

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, wait for those there are, end the rest, and stop vLLM."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._jobs, timeout=grace)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    # -- the thread ----------------------------------------------------------------------------

    async def _live(self, start: Callable[[], Awaitable[Any]], started: Future[None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self._llm = await start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            await self._stop.wait()
            for name in self._tasks:
                self._let_go(name)
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        finally:
            self._llm.shutdown()

    def _begin(self, name: str, job: Job, sink: Sink) -> None:
        task = self._loop.create_task(self._answer(name, job, sink))
        self._tasks[name] = task
        # a task that is cancelled before it begins runs none of its own code, but calls this
        task.add_done_callback(lambda done: self._over(name, job, sink, done))

    def _let_go(self, name: str) -> None:
        # a second cancel would cut short what the first has begun: telling vLLM to abort
        if (task := self._tasks.get(name)) and not task.cancelling():
            task.cancel()

    def _over(self, name: str, job: Job, sink: Sink, task: asyncio.Task[End]) -> None:
        del self._tasks[name]
        if job.directive.codes and self.alive():
            self._codes.drop(job.directive.key)
        with self._changed:
            del self._jobs[name]
            self._changed.notify_all()
        sink(self._end(job, task))

    def _end(self, job: Job, task: asyncio.Task[End]) -> End:
        if task.cancelled():
            return End("cancelled", "the server is shutting down" if self._closing else "")
        error = task.exception()
        if error is None:
            return task.result()
        cause = error.__cause__ or error  # vLLM wraps most of them
        facts = {"tokens": len(job.prompt)}
        log.error("a request failed", exc_info=cause, extra={"facts": facts})
        return End("error", f"the model failed: {type(cause).__name__}")

    async def _answer(self, name: str, job: Job, sink: Sink) -> End:
        steps, reason = Steps(job), None
        prompt = {"type": "token", "prompt_token_ids": list(job.prompt)}
        outputs = self._llm.generate(prompt, self._params(job), name)
        async with contextlib.aclosing(outputs):  # which aborts the request, if it runs still
            async for output in outputs:
                (new,) = output.outputs
                reason = new.finish_reason
                if job.directive.codes:
                    steps.add(await self._codes.of(job.directive.key))
                for item in steps.of(new.token_ids, new.logprobs):
                    if isinstance(item, End):
                        return item
                    sink(item)
        return End("error", f"vLLM has ended the answer: {reason}")

    async def _take(self, keys: Sequence[str]) -> dict[str, Packed]:
        """The codes of requests since the last time; what vLLM owes when it dies never comes."""
        call = asyncio.ensure_future(self._llm.collective_rpc("saert_codes", args=(list(keys),)))
        try:
            while not (await asyncio.wait({call}, timeout=PATIENCE))[0]:
                if self._llm.errored:
                    raise RuntimeError("vLLM has died")
            return {key: packed for reply in call.result() for key, packed in reply.items()}
        finally:
            call.cancel()
