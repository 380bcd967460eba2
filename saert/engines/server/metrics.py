"""Counters for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from saert.engines.server.engine import Load

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The server's counters, in a registry of their own. `load` is asked whenever they are read."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "saert_requests", "Requests by path and outcome", ["path", "outcome"], registry=registry
        )
        self.tokens = Counter("saert_tokens", "Tokens", ["kind"], registry=registry)
        self.events = Counter(
            "saert_monitor_events", "Monitors that went off", ["action"], registry=registry
        )
        self.edited = Counter(
            "saert_edited_requests", "Requests with edits or splices", registry=registry
        )
        self.seconds = Histogram(
            "saert_request_seconds",
            "From a request to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "saert_first_token_seconds",
            "From a request to its first token",
            buckets=FIRST,
            registry=registry,
        )
        running = Gauge("saert_requests_running", "Answers being written", registry=registry)
        running.set_function(lambda: load().running)
        waiting = Gauge("saert_requests_waiting", "Requests that wait", registry=registry)
        waiting.set_function(lambda: load().waiting)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)
