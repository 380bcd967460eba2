"""The door: host, key, media type and size are checked before a request is read; then one log line
and one count for each, however it ends."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.responses import JSONResponse

from saert.engines.server.errors import as_error
from saert.engines.server.limits import BodyLimit, Limits
from saert.engines.server.metrics import Metrics
from saert.engines.server.security import Keys, host_allowed

OPEN = ("/health",)  # without a key
log = logging.getLogger("saert.serve")


def refuse(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An ASGI application that says no."""
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    if status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not read
    return JSONResponse(as_error(status, message, code), status, headers)


class Front:
    """ASGI middleware around everything else.

    Args:
        bound: the address that the server listens at.
    """

    def __init__(self, app: Any, keys: Keys, limits: Limits, metrics: Metrics, bound: str) -> None:
        self._keys, self._metrics, self._bound = keys, metrics, bound
        self._app = BodyLimit(app, limits, refuse)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        facts: dict[str, Any] = scope.setdefault("saert.facts", {})

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            app = self._objection(scope) or self._app
            await app(scope, receive, noted)
        finally:
            self._note(scope, status, time.monotonic() - began, facts)

    def _objection(self, scope: Any) -> JSONResponse | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not host_allowed(headers.get(b"host", ""), self._bound):
            return refuse(403, "this server answers to the names of this machine only")
        if scope["path"] not in OPEN and not self._keys.allow(headers.get(b"authorization")):
            return refuse(401, "missing or wrong API key: Authorization: Bearer KEY", "invalid_key")
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return refuse(415, f"content-type: found {kind[:80]!r}, expected application/json")
        return None

    def _note(self, scope: Any, status: int, seconds: float, facts: dict[str, Any]) -> None:
        path = getattr(scope.get("route"), "path", None) or "other"
        outcome = facts.pop("outcome", None) or ("ok" if status < 400 else str(status))
        self._metrics.requests.labels(path, outcome).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
        line = {
            "method": scope["method"],
            "path": path,
            "status": status or None,
            "outcome": outcome,
            "ms": round(1000 * seconds, 1),
        }
        log.log(level, "request", extra={"facts": line | facts})
