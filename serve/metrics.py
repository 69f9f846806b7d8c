"""What a server counts, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and distributions.

    Labels have few values: a route is one of the server's or "other", a task one that there was when it was
    asked for, or "".
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "loracle_requests", "Requests answered.", ("route", "status", "task"), registry=self.registry
        )
        self.prompt_tokens = Counter(
            "loracle_prompt_tokens", "Tokens of prompts answered.", ("task",), registry=self.registry
        )
        self.answer_tokens = Counter(
            "loracle_answer_tokens", "Tokens written.", ("task",), registry=self.registry
        )
        self.first_token = Histogram(
            "loracle_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ("task",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "loracle_request_seconds",
            "From a request's arrival to its end.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "loracle_batch_rows",
            "Prompts answered together.",
            buckets=_ROWS,
            registry=self.registry,
        )

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Tell a number that is read when it is asked for."""
        Gauge(name, documentation, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
