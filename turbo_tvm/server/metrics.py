"""Metrics of the server, for Prometheus. They follow Triton's and text-embeddings-inference's; units are in the names.

With several workers each has numbers of its own; prometheus-client adds them up from files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from turbo_tvm import config
from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_TOKENS = tuple(2**i for i in range(3, 16))
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


disable_created_metrics()  # the time at which each began to count, which would be a third more lines


class Metrics:
    """All metrics of a server. The models' have a label `model`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("turbo_requests", "Requests by outcome.", "protocol", "outcome")
        self._seconds = self._histogram("turbo_request_seconds", "From request to answer.", _SECONDS, "protocol")
        self._known: dict[tuple[str, str], Any] = {}
        self._times: dict[str, Any] = {}
        self.queue_size = self._gauge("turbo_queue_size", "Requests that wait.")
        self.queue = self._histogram("turbo_queue_seconds", "From submission to the start of the batch.", _SECONDS)
        self.tokenization = self._histogram("turbo_tokenization_seconds", "Of the texts of a request.", _SECONDS)
        self.execution = self._histogram("turbo_execution_seconds", "Of a batch.", _SECONDS)
        self.batch_tokens = self._histogram("turbo_batch_tokens", "Tokens of a batch.", _TOKENS)
        self.batch_size = self._histogram("turbo_batch_sequences", "Sequences of a batch.", _SEQUENCES)
        self.rows = self._counter("turbo_rows", "Token rows that were computed.", "model")
        self.padding = self._counter("turbo_padding_rows", "Of them those that no request asked for.", "model")
        self.cost_error = self._histogram(
            "turbo_cost_error_ratio", "|predicted - measured| / measured seconds of a batch.", _ERRORS
        )
        self.arena = self._gauge("turbo_arena_bytes", "Memory held between kernels and for outputs.")
        self.cache_hits = self._counter("turbo_cache_hits", "Answers from the response cache.", "model")
        self.cache_misses = self._counter("turbo_cache_misses", "Answers that were computed.", "model")

    def request(self, protocol: str, outcome: str, seconds: float) -> None:
        """Count a request that ended with this outcome."""
        key = protocol, outcome
        if key not in self._known:
            self._known[key] = self._requests.labels(protocol, outcome)
        if protocol not in self._times:
            self._times[protocol] = self._seconds.labels(protocol)
        self._known[key].inc()
        self._times[protocol].observe(seconds)

    def of_model(self, name: str) -> ModelMetrics:
        """Return the metrics of a model."""
        return ModelMetrics(self, name)

    def forget(self, name: str) -> None:
        """Remove the gauges of a model that was unloaded."""
        for gauge in (self.queue_size, self.arena):
            gauge.remove(name)

    def exposition(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, of all workers, and its content type."""
        registry = self.registry
        folder = config.counts_with_others()
        if folder is not None:
            _forget_the_dead(folder)
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model",), registry=self.registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], label: str = "model") -> Histogram:
        return Histogram(name, text, (label,), registry=self.registry, buckets=bounds)


def _forget_the_dead(folder: Path) -> None:
    """Remove the gauges of workers that died, whose requests wait no longer; their counters stay."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid, str(folder))
        except PermissionError:
            pass


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, metrics: Metrics, name: str):
        self.tokenization = metrics.tokenization.labels(name)
        self._queue, self._execution = metrics.queue.labels(name), metrics.execution.labels(name)
        self._tokens, self._size = metrics.batch_tokens.labels(name), metrics.batch_size.labels(name)
        self._rows, self._padding = metrics.rows.labels(name), metrics.padding.labels(name)
        self._error = metrics.cost_error.labels(name)
        self._hits, self._misses = metrics.cache_hits.labels(name), metrics.cache_misses.labels(name)
        self._queue_size, self._arena = metrics.queue_size.labels(name), metrics.arena.labels(name)
        self._seen = 0, 0

    def batch(self, record: BatchRecord) -> None:
        """Count a batch that has run."""
        tokens = sum(record.lengths)
        for waited in record.waited_s:
            self._queue.observe(waited)
        self._execution.observe(record.seconds)
        self._tokens.observe(tokens)
        self._size.observe(len(record.lengths))
        self._rows.inc(record.rows)
        self._padding.inc(record.rows - tokens)
        self._error.observe(abs(record.predicted_s - record.seconds) / max(record.seconds, 1e-9))

    def sample(self, waiting: int, arena_bytes: int, answered: int, cache_hits: int, shared: int) -> None:
        """Update gauges and cache counters from an engine's statistics; these three count since its start."""
        self._queue_size.set(waiting)
        self._arena.set(arena_bytes)
        hits, misses = cache_hits, answered - cache_hits - shared
        self._hits.inc(hits - self._seen[0])
        self._misses.inc(misses - self._seen[1])
        self._seen = hits, misses
