"""Completions and chats: from a checked body to an answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from saert.engines.server.answers import Answer, Piece
from saert.engines.server.engine import Busy, Closing, End, Engine, Job
from saert.engines.server.errors import Refusal, as_error
from saert.engines.server.jobs import Jobs
from saert.engines.server.limits import Limits
from saert.engines.server.metrics import Metrics
from saert.engines.server.schema import Chat, Completion
from saert.engines.server.shelf import Shelf
from saert.engines.server.streams import Failed, Gone, Ticket, TooLate, while_connected

RETRY = {"retry-after": "1"}


@dataclass
class Service:
    """All that the routes need.

    Attributes:
        name: of the model, as clients call it.
        log_text: whether prompts and answers may be logged.
    """

    name: str
    engine: Engine
    shelf: Shelf
    jobs: Jobs
    limits: Limits
    metrics: Metrics
    log_text: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._reading = asyncio.Lock()  # tokenizers are not made for several threads

    async def answer(self, request: Request, body: Completion | Chat) -> Response:
        """The response to a request. Raises Refusal."""
        if body.model != self.name:
            raise Refusal(
                404,
                f"there is no model {body.model[:80]!r} here; this server has {self.name!r}",
                "model_not_found",
            )
        chat = isinstance(body, Chat)
        try:
            async with self._reading:
                read = self.jobs.chat if chat else self.jobs.completion
                job: Job = await asyncio.to_thread(read, body)  # type: ignore[arg-type]
            ticket = Ticket(self.engine, job, self.limits.seconds)
        except (ValueError, TypeError) as error:
            raise Refusal(400, str(error), "invalid_value") from None
        except Busy as error:
            raise Refusal(429, f"{error}; try again soon", "busy", RETRY) from None
        except Closing as error:
            raise Refusal(503, str(error), "shutting_down", RETRY) from None
        answer = Answer(
            kind="chat" if chat else "completion",
            model=self.name,
            job=job,
            tokenizer=self.jobs.tokenizer,
            shelf=self.shelf,
            stops=body.stops,
            asked=body.saert is not None,
        )
        facts = request.scope.setdefault("saert.facts", {})
        facts |= {"id": answer.id, "outcome": "cancelled", "stream": body.stream}
        if self.log_text:
            facts["prompt"] = self.jobs.tokenizer.decode(list(job.prompt))
        if job.directive.changes:
            self.metrics.edited.inc()
        pieces = self._pieces(answer, ticket, facts)
        headers = {"x-request-id": answer.id}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _Events(_events(answer, pieces, usage), ticket, headers)
        try:
            whole = await while_connected(request.receive, _collected(pieces))
        except Gone:
            return Response(status_code=499)  # nobody reads it
        except TooLate as error:
            raise Refusal(504, str(error), "timeout") from None
        except Failed as error:
            raise Refusal(500, str(error), "engine_error") from None
        finally:
            ticket.close()
        return JSONResponse(answer.whole(whole), headers=headers)

    async def _pieces(
        self, answer: Answer, ticket: Ticket, facts: dict[str, Any]
    ) -> AsyncIterator[Piece]:
        began, text, events = time.monotonic(), [], 0
        try:
            async for item in ticket.steps():
                if not answer.written:
                    self.metrics.first.observe(time.monotonic() - began)
                piece = answer.end(item) if isinstance(item, End) else answer.add(item)
                for event in piece.events:
                    events += 1
                    self.metrics.events.labels(event["action"]).inc()
                if self.log_text:
                    text.append(piece.text)
                if answer.finish is not None:
                    facts["outcome"] = "ok"
                    ticket.close()
                yield piece
                if answer.finish is not None:
                    return
        except TooLate:
            facts["outcome"] = "timeout"
            raise
        except Failed:
            facts["outcome"] = "failed"
            raise
        finally:
            directive = answer.job.directive
            facts |= answer.usage | {
                "finish": answer.finish,
                "edits": len(directive.edits),
                "splices": len(directive.splice),
                "events": events,
            }
            if self.log_text:
                facts["text"] = "".join(text)
            self.metrics.tokens.labels("prompt").inc(len(answer.job.prompt))
            self.metrics.tokens.labels("generated").inc(answer.written)


async def _collected(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _events(answer: Answer, pieces: AsyncIterator[Piece], usage: bool) -> AsyncIterator[str]:
    """Server-sent events. What goes wrong now can only be said in one of them."""
    if answer.kind == "chat":
        yield _event(answer.chunk(Piece(), role=True))
    try:
        async for piece in pieces:
            if not piece.empty or answer.finish is not None:
                yield _event(answer.chunk(piece))
    except (TooLate, Failed) as error:
        code = "timeout" if isinstance(error, TooLate) else "engine_error"
        yield _event(as_error(500, str(error), code))
        return
    if usage:
        yield _event(answer.usage_chunk())
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Events(StreamingResponse):
    """A stream that lets go of its job however it ends."""

    def __init__(
        self, content: AsyncIterator[str], ticket: Ticket, headers: dict[str, str]
    ) -> None:
        headers = headers | {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._content, self._ticket = content, ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()
            with suppress(RuntimeError):  # it runs still: then the cancellation reaches it
                await self._content.aclose()  # type: ignore[attr-defined]
