"""What a client may take: bytes, seconds, answers at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Attributes:
    streams: answers written at a time; waiting: requests that wait for a place.
    max_tokens: of one answer; body: bytes of a request; body_seconds: to send it in.
    seconds: from a request to the end of its answer.
    grace: seconds that answers under way get at shutdown.
    """

    streams: int = 64
    waiting: int = 256
    max_tokens: int = 4096
    body: int = 1_000_000
    body_seconds: float = 30.0
    seconds: float = 600.0
    grace: float = 30.0


class BodyLimit:
    """ASGI middleware: a body that is too long, or too long on its way, is not read on.

    `refuse(status, message)` makes the answer: an ASGI application.
    """

    def __init__(self, app: Any, limits: Limits, refuse: Any) -> None:
        self.app, self.limits, self.refuse = app, limits, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        most = self.limits.body
        too_long = self.refuse(413, f"the body has more than {most} bytes, which this server takes")
        if not declared.isdigit() or int(declared) > most:
            await too_long(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # gone already
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        await too_long(scope, receive, send)
                        return
        except TimeoutError:
            seconds = self.limits.body_seconds
            late = self.refuse(408, f"the body did not arrive within {seconds:g} seconds")
            await late(scope, receive, send)
            return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)
