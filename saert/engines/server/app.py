"""Routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from saert.engines.server.errors import Refusal, as_error
from saert.engines.server.front import Front
from saert.engines.server.schema import Chat, Completion
from saert.engines.server.security import Keys
from saert.engines.server.service import Service
from saert.engines.server.shelf import Unknown

log = logging.getLogger("saert.serve")


def create_app(service: Service, keys: Keys, *, bound: str = "127.0.0.1") -> FastAPI:
    """The ASGI application. At its shutdown the engine is closed.

    Args:
        keys: API keys; none let everyone in.
        bound: the address it will listen at.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)
        log.info("stopped")

    app = FastAPI(
        title="saert", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
    )
    app.add_middleware(
        Front, keys=keys, limits=service.limits, metrics=service.metrics, bound=bound
    )
    _errors(app)
    weights = asyncio.Semaphore(2)  # the logit lens reads whole dictionaries

    @app.post("/v1/completions")
    async def completions(request: Request, body: Completion) -> Response:
        return await service.answer(request, body)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Chat) -> Response:
        return await service.answer(request, body)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != service.name:
            raise Refusal(404, f"there is no model {name[:80]!r} here", "model_not_found")
        return _model(service)

    @app.get("/v1/saert/sources")
    async def sources() -> Any:
        return {"object": "list", "data": service.shelf.describe()}

    @app.get("/v1/saert/features/{feature:path}")
    async def feature(feature: str) -> Any:
        try:
            async with weights:
                return JSONResponse(await asyncio.to_thread(service.shelf.feature, feature))
        except Unknown as error:
            raise Refusal(404, str(error), "not_found") from None

    @app.get("/health")
    async def health() -> Any:
        alive = service.engine.alive()
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "saert",
        "max_model_len": service.engine.context,
    }


def _errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Any) -> JSONResponse:
        body = as_error(error.status, error.message, error.code)
        return JSONResponse(body, error.status, error.headers)

    async def invalid(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(as_error(400, _first(error.errors()), "invalid_value"), 400)

    async def http(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(as_error(error.status_code, str(error.detail)), error.status_code)

    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(as_error(500, "the server failed", "internal_error"), 500)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def _first(errors: Any) -> str:
    """What is wrong, of pydantic's list: of several spellings the last, which is the richest."""
    one = errors[0]
    place = ".".join(str(part) for part in one["loc"] if part != "body")
    said = str(one["msg"]).removeprefix("Value error, ")
    return f"{place}: {said}" if place else said
