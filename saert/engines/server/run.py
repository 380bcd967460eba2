"""A server from a session: assemble it, and run it until it is told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn

from saert.engines.server.app import create_app
from saert.engines.server.batching import Batching
from saert.engines.server.engine import Engine
from saert.engines.server.jobs import Jobs
from saert.engines.server.limits import Limits
from saert.engines.server.logs import setup
from saert.engines.server.metrics import Metrics
from saert.engines.server.security import Keys
from saert.engines.server.service import Service
from saert.engines.server.shelf import Shelf
from saert.hub.session import Session
from saert.measure.features.index import FeatureIndex
from saert.twin import twin

log = logging.getLogger("saert.serve")
Start = Callable[[Session, Shelf, Limits], Engine]


def on_transformers(session: Session, shelf: Shelf, limits: Limits) -> Engine:
    """An engine on the session's model. Raises ValueError for what cannot be served."""
    return Batching(
        twin(session.model),
        shelf.saes,
        shelf.attached,
        streams=limits.streams,
        waiting=limits.waiting,
    )


def service_of(
    session: Session,
    limits: Limits,
    *,
    name: str | None = None,
    slots: int = 16,
    template: str | None = None,
    indices: Mapping[str, FeatureIndex] | None = None,
    log_text: bool = False,
    start: Start = on_transformers,
) -> Service:
    """The engine that `start` makes, and all around it. Raises what `start` raises."""
    model, tokenizer = session.model, session.tokenizer
    shelf = Shelf(session.saes, model, tokenizer, indices, slots)
    engine = start(session, shelf, limits)
    jobs = Jobs(shelf, tokenizer, engine.context, limits.max_tokens, _stops(model), template)
    return Service(
        name=name or session.name,
        engine=engine,
        shelf=shelf,
        jobs=jobs,
        limits=limits,
        metrics=Metrics(engine.load),
        log_text=log_text,
    )


def serve(service: Service, keys: Keys, host: str, port: int, level: int = logging.INFO) -> None:
    """Listen until SIGINT or SIGTERM; answers under way then get `limits.grace` seconds."""
    setup(level)
    server(service, keys, host, port).run()


def server(service: Service, keys: Keys, host: str, port: int) -> uvicorn.Server:
    """The uvicorn server that `serve` runs."""
    limits = service.limits
    config = uvicorn.Config(
        create_app(service, keys, bound=host),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(limits.grace)),
        limit_concurrency=limits.streams + limits.waiting + 64,
        lifespan="on",
    )
    return uvicorn.Server(config)


def _stops(model: Any) -> frozenset[int]:
    """The ids that end an answer, as the model's generation config has them."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list | tuple) else frozenset((int(found),))
