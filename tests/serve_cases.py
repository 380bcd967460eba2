"""`saert serve` in a thread, on the bundled model with two of its SAEs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from saert.engines.server.limits import Limits
from saert.engines.server.run import server, service_of
from saert.engines.server.security import Keys
from saert.hub.session import BUNDLED, open_session

KEY = "a-key-for-tests"
SOURCES = [f"{BUNDLED}:resid_post.2", f"{BUNDLED}:mlp_in.2"]  # the second is a transcoder
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
FOOD, PROMPT = 71, "Once upon a time, there was a little girl named Lily. One day, she"


class Running:
    """A server that runs: `address`, and its `service`."""

    def __init__(self, service: Any, address: str) -> None:
        self.service, self.address = service, address

    def client(self, **options: Any) -> Any:
        """An `openai` client of it."""
        from openai import OpenAI

        options = {"api_key": KEY, "max_retries": 0, "timeout": 120} | options
        return OpenAI(base_url=f"{self.address}/v1", **options)

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Return when no job runs or waits and no row is lent; fail after some time."""
        end = time.monotonic() + seconds
        while (load := self.service.engine.load()) and any(vars(load).values()):
            assert time.monotonic() < end, f"still busy: {load}"
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    limits: Limits | None = None, key: str | None = KEY, **options: Any
) -> Iterator[Running]:
    """A server, stopped on leaving."""
    session = open_session(None, SOURCES)
    service = service_of(
        session, limits or Limits(grace=1.0), template=TEMPLATE, **({"name": BUNDLED} | options)
    )
    uvicorn = server(service, Keys([key] if key else []), "127.0.0.1", 0)
    thread = threading.Thread(target=uvicorn.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not uvicorn.started:
            assert thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        port = uvicorn.servers[0].sockets[0].getsockname()[1]
        yield Running(service, f"http://127.0.0.1:{port}")
    finally:
        uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not service.engine.alive()
