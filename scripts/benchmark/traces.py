"""Streams of requests, one sequence each, for the memory benchmark: lengths in tokens, in order of arrival."""

from __future__ import annotations

import numpy as np

REQUESTS = 1000
LONGEST = 500


def traces(seed: int, requests: int = REQUESTS) -> dict[str, tuple[int, ...]]:
    """By name: uniform in 5..500; log-normal around 20; short and long in turn; slowly growing from 5 to 500."""
    rng = np.random.default_rng(seed)
    long_tailed = np.clip(np.rint(rng.lognormal(np.log(20), 1.0, requests)), 2, LONGEST).astype(int)
    short, long = rng.integers(5, 20, requests), rng.integers(400, LONGEST + 1, requests)
    made = {
        "uniform": rng.integers(5, LONGEST + 1, requests),
        "long-tailed": long_tailed,
        "alternating": np.where(np.arange(requests) % 2, long, short),
        "growing": np.linspace(5, LONGEST, requests).round().astype(int),
    }
    return {name: tuple(lengths.tolist()) for name, lengths in made.items()}
