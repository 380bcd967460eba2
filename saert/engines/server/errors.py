"""Errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 2000


class Refusal(Exception):
    """A request that gets no answer: the HTTP status, and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})


def as_error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    said = message if len(message) <= LONGEST else f"{message[: LONGEST - 1]}…"
    return {"error": {"message": said, "type": kind, "param": None, "code": code}}
