"""Codes out of vLLM's workers while their requests run: `Fetch`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

Packed = dict[str, bytes]  # by hookpoint


class Fetch:
    """One call at a time, for all who have asked while the one before was under way.

    Args:
        call: takes the codes of some requests out of the workers, by request.
    """

    def __init__(self, call: Callable[[Sequence[str]], Awaitable[dict[str, Packed]]]) -> None:
        self._call = call
        self._asked: dict[str, asyncio.Future[Packed]] = {}
        self._task: asyncio.Task[None] | None = None

    async def of(self, key: str) -> Packed:
        """A request's codes since the last call. Raises what `call` raises."""
        return await self._ask(key)

    def drop(self, key: str) -> None:
        """Let the workers forget what they hold of a request that is over."""
        self._ask(key).add_done_callback(lambda done: done.cancelled() or done.exception())

    def _ask(self, key: str) -> asyncio.Future[Packed]:
        loop = asyncio.get_running_loop()
        future = self._asked.setdefault(key, loop.create_future())
        if self._task is None:
            self._task = loop.create_task(self._work())
        return future

    async def _work(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, {}
                try:
                    found = await self._call(list(asked))
                except Exception as error:
                    for future in asked.values():
                        if not future.done():  # whoever asked may have gone
                            future.set_exception(error)
                else:
                    for key, future in asked.items():
                        if not future.done():
                            future.set_result(found.get(key, {}))
        finally:
            self._task = None
