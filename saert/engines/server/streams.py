"""One request's way through the engine, on the event loop: steps, time limit, a client who leaves.

Whatever ends it (the answer, a stop text, the time limit, the client, the server), the engine is
told to let go, so no slot outlives its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from saert.engines.server.engine import End, Engine, Job, Step

T = TypeVar("T")


class Failed(RuntimeError):
    """The engine could not finish the answer."""


class TooLate(RuntimeError):
    """The time limit has passed."""


class Gone(RuntimeError):
    """The client does not wait any more."""


class Ticket:
    """A job at an engine. Raises what `Engine.submit` raises."""

    def __init__(self, engine: Engine, job: Job, seconds: float) -> None:
        self._engine, self._deadline = engine, time.monotonic() + seconds
        self._queue: asyncio.Queue[Step | End] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(item: Step | End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self._name = engine.submit(job, sink)

    def close(self) -> None:
        """Let go of it."""
        self._engine.cancel(self._name)

    async def steps(self) -> AsyncIterator[Step | End]:
        """What the engine says, to the end. Raises TooLate, Failed."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                item = await asyncio.wait_for(self._queue.get(), max(0.0, left))
            except TimeoutError:
                raise TooLate("the answer took longer than this server allows") from None
            if isinstance(item, End) and item.reason in ("error", "cancelled"):
                raise Failed(item.message or "cancelled")
            yield item
            if isinstance(item, End):
                return


async def while_connected(receive: Any, work: Awaitable[T]) -> T:
    """The outcome of `work`, unless the client leaves before: then it is cancelled, and Gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone("the client has disconnected")
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
