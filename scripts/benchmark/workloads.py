"""What is asked of every contender: a grid of fixed shapes, and ragged sets of requests."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

BATCHES = (1, 8, 32)
LENGTHS = (8, 16, 32, 64, 128, 256, 512)
RAGGED_REQUESTS = 32
QUICK = ("1x16", "8x64", "ragged-uniform-2-100")
GRID, RAGGED = "grid", "ragged"


@dataclass(frozen=True)
class Workload:
    """A list of requests. name: what `--only` looks at; label: what a reader sees."""

    name: str
    label: str
    kind: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def sequences(self, seed: int, vocabulary: int) -> list[np.ndarray]:
        """Token ids: the same for the same seed, whichever other workloads run."""
        rng = _random(seed, f"tokens of {self.name}")
        return [rng.integers(1, vocabulary, n) for n in self.lengths]


def all_workloads(seed: int) -> list[Workload]:
    return [*grid(), *ragged(seed)]


def grid() -> list[Workload]:
    return [Workload(f"{b}x{n}", f"{b} x {n}", GRID, (n,) * b) for b in BATCHES for n in LENGTHS]


def ragged(seed: int) -> list[Workload]:
    """Sets of requests of different lengths: two uniform, one with a long tail as in real traffic."""
    sets = [
        ("ragged-uniform-5-500", "uniform 5..500", _uniform(seed, 5, 500)),
        ("ragged-uniform-2-100", "uniform 2..100", _uniform(seed, 2, 100)),
        ("ragged-long-tailed", "long-tailed, median 20", _long_tailed(seed)),
    ]
    return [Workload(name, f"{RAGGED_REQUESTS} of {text}", RAGGED, lengths) for name, text, lengths in sets]


def select(workloads: list[Workload], only: str | None, quick: bool) -> list[Workload]:
    """Those of the quick run, if asked, and of these the ones whose name contains `only`."""
    wanted = [w for w in workloads if not quick or w.name in QUICK]
    return [w for w in wanted if only is None or only in w.name]


def _uniform(seed: int, low: int, high: int) -> tuple[int, ...]:
    rng = _random(seed, f"uniform {low} {high}")
    return tuple(rng.integers(low, high + 1, RAGGED_REQUESTS).tolist())


def _long_tailed(seed: int, median: float = 20.0, sigma: float = 1.0) -> tuple[int, ...]:
    """Log-normal lengths: at sigma 1 one request in six is longer than 2.7 times the median, one in 44 than 7.4."""
    drawn = _random(seed, "long-tailed").lognormal(np.log(median), sigma, RAGGED_REQUESTS)
    return tuple(np.clip(np.rint(drawn), 2, 512).astype(int).tolist())


def _random(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
