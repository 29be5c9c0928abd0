"""What the dashboard shows of a model: the last minutes second by second, and the composition of the last batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord

SECONDS = 180
BATCHES = 32
_LATENCIES = 4096  # of the last requests, for percentiles


class Dashboard:
    """The latest batches, seconds and latencies of a model. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: deque[dict[str, Any]] = deque(maxlen=BATCHES)
        self._seconds: deque[list[float]] = deque(maxlen=SECONDS)  # [second, requests, tokens, busy seconds]
        self._latencies: deque[tuple[float, float]] = deque(maxlen=_LATENCIES)

    def batch(self, record: BatchRecord) -> None:
        """Count a batch that has run."""
        now = time.time()
        with self._lock:
            self._batches.append({"at": now, "lengths": record.lengths, "rows": record.rows, "seconds": record.seconds})
            second = self._second(int(now))
            second[1] += len(record.lengths)
            second[2] += sum(record.lengths)
            second[3] += record.seconds
            for waited in record.waited_s:
                self._latencies.append((now, waited + record.seconds))

    def state(self) -> dict[str, Any]:
        """Return everything, in a form for JSON. Times are in seconds, `at` and `now` since 1970."""
        with self._lock:
            batches, seconds = list(self._batches), [list(second) for second in self._seconds]
            now = time.time()
            latencies = sorted(latency for at, latency in self._latencies if now - at < 60)
        percentiles = {str(p): _percentile(latencies, p) for p in (50, 95, 99)}
        return {"now": now, "batches": batches, "seconds": seconds, "latency_s": percentiles}

    def _second(self, now: int) -> list[float]:
        if not self._seconds or self._seconds[-1][0] != now:
            self._seconds.append([now, 0, 0, 0.0])
        return self._seconds[-1]


def _percentile(ordered: list[float], percent: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else None
