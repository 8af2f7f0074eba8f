"""Records each request: a log line, and figures for Prometheus.

Log lines and figures never contain a prompt, a reply or a key.
"""

import logging
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stream_generator.engine.engine import Engine
from stream_generator.request import Request
from stream_service.wire import timings, usage

logger = logging.getLogger("stream_service.requests")

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GAP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The figures of one service, in their own registry."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "llm_requests", "Answered requests.", ["route", "status"], registry=registry
        )
        self._finished = Counter(
            "llm_replies", "Replies, by finish reason.", ["finish_reason"], registry=registry
        )
        self._prompt_tokens = Counter(
            "llm_prompt_tokens", "Prompt tokens of requests that got a slot.", registry=registry
        )
        self._cached_tokens = Counter(
            "llm_prefix_cached_tokens", "Prompt tokens taken from the prefix cache.",
            registry=registry,
        )  # fmt: skip
        self._prefix_hits = Counter(
            "llm_prefix_hits", "Prompts with a prefix from the cache.", registry=registry
        )
        self._reply_tokens = Counter("llm_reply_tokens", "Reply tokens.", registry=registry)
        self._first = Histogram(
            "llm_time_to_first_token_seconds", "Time from a request to its first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._gap = Histogram(
            "llm_time_per_token_seconds", "Mean time between the tokens of a reply.",
            buckets=GAP_SECONDS, registry=registry,
        )  # fmt: skip
        self._queue = Histogram(
            "llm_queue_seconds", "Time that a request waited for a slot.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        for name, text, value in (
            ("llm_requests_running", "Requests that have a slot.", lambda: engine.running),
            ("llm_requests_waiting", "Requests that wait for a slot.", lambda: engine.waiting),
            ("llm_engine_healthy", "1 if the engine is healthy.", lambda: engine.life.is_healthy),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def exposition(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def record(
        self,
        request_id: str,
        route: str,
        status: int,
        began: float,
        requests: list[Request],
        n: int,
    ) -> None:
        """Record a closed answer. began: by time.monotonic(). requests: the engine's requests, `n`
        for each prompt."""
        self._requests.labels(route, str(status)).inc()
        for request in requests:
            self._count(request)
        facts: dict[str, Any] = {
            "request_id": request_id, "route": route, "status": status,
            "ms": round((time.monotonic() - began) * 1000),
        }  # fmt: skip
        if requests:
            tokens = usage(requests, n)
            facts |= {
                "prompt_tokens": tokens["prompt_tokens"],
                "reply_tokens": tokens["completion_tokens"],
                **timings(requests[0]),
                "finish_reason": ",".join(str(r.finish_reason or "abort") for r in requests),
            }
        line = " ".join(f"{name}={value}" for name, value in facts.items() if value is not None)
        logger.info(line, extra=facts)

    def _count(self, request: Request) -> None:
        self._finished.labels(str(request.finish_reason or "abort")).inc()
        self._reply_tokens.inc(len(request.output_ids))
        if request.started_at is None:
            return
        self._queue.observe(request.started_at - request.submitted_at)
        self._prompt_tokens.inc(len(request.prompt_ids))
        self._cached_tokens.inc(request.num_cached_tokens)
        self._prefix_hits.inc(request.num_cached_tokens > 0)
        if request.first_token_at is None:
            return
        self._first.observe(request.first_token_at - request.submitted_at)
        gaps = len(request.output_ids) - 1
        if gaps > 0 and request.last_token_at is not None:
            self._gap.observe((request.last_token_at - request.first_token_at) / gaps)
