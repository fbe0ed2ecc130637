"""Figures for Prometheus."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from fallow.engine.stats import Stats
from fallow.serving.worker import Worker

PATHS = (
    "/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings", "/v1/models",
    "/health", "/metrics",
)  # fmt: skip
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
SPEED = (1, 2, 5, 10, 20, 50, 100, 200)  # tokens per second


class Telemetry:
    """One server's counters."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._responses = Counter(
            "fallow_responses", "Responses begun", ("path", "status"), registry=registry
        )
        self._tokens = Counter(
            "fallow_tokens",
            "Tokens of answers and embeddings: read (prompt), of these cached, and new",
            ("kind",),
            registry=registry,
        )
        self._first = Histogram(
            "fallow_first_token_seconds",
            "From an answer's turn to its first token",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self._speed = Histogram(
            "fallow_decode_tokens_per_second", "Of answers", buckets=SPEED, registry=registry
        )
        self._idle = Gauge(
            "fallow_neurons_idle_ratio", "Inactive neurons, mean of layers", registry=registry
        )
        waiting = Gauge("fallow_requests_waiting", "Answers in the queue", registry=registry)
        waiting.set_function(lambda: worker.waiting)
        running = Gauge("fallow_requests_running", "Answers being made", registry=registry)
        running.set_function(lambda: worker.n_running)

    def responded(self, path: str, status: int) -> None:
        known = path if path in PATHS else "other"  # clients must not make labels
        self._responses.labels(known, str(status)).inc()

    def answered(self, stats: Stats) -> None:
        kinds = ("prompt", "cached", "new")
        counts = (stats.prompt_tokens, stats.cached_tokens, stats.new_tokens)
        for kind, count in zip(kinds, counts, strict=True):
            self._tokens.labels(kind).inc(count)
        if stats.ttft_ms:  # an embedding has no first token
            self._first.observe(stats.ttft_ms / 1e3)
        if stats.decode_tps:
            self._speed.observe(stats.decode_tps)
            self._idle.set(stats.sparsity)

    def text(self) -> bytes:
        return generate_latest(self._registry)
