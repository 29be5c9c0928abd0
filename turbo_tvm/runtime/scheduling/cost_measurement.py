"""Warm-up: measures a small design of batches on the device, from which `cost_model` learns what any batch costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from turbo_tvm.runtime.scheduling.cost_model import Point

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
BATCHES = (1, 4, 16, 64)
RAGGED = ((2, 100), (2, 30), (5, 500), (50, 250))  # uniform lengths of the held-out batches, which have RAGGED_SIZES
RAGGED_SIZES = (6, 16, 4, 2)
LEAST_SAMPLES, MOST_SAMPLES = 2, 7
SHORT_S = 0.03  # a point is sampled for so long at least
SHARE = 0.2  # of the budget: a point that is expected to take more for one sample is left out

Run = Callable[[Sequence[int]], object]
Say = Callable[[str], None]


def measure(
    run: Run,
    max_length: int,
    max_tokens: int,
    *,
    min_length: int = 1,
    budget_s: float = 5.0,
    seed: int = 0,
    say: Say = lambda _text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Point], list[Point]]:
    """Points to fit, and ragged ones to hold out, in about `budget_s` seconds.

    run(lengths) answers a batch. min_length: tokens that a sequence has at least; of images, all of them. Starts with
    what tells most: single sequences, then small batches. What would take too long is left out, but a sequence of 8
    tokens and of the greatest length are always measured, and a ragged batch.
    """
    started = clock()
    held_out = _sampled(
        run, _ragged(min_length, max_length, max_tokens, seed), 0.3 * budget_s, say, clock, "held-out batch"
    )
    left = budget_s - (clock() - started)
    return _sampled(
        run, _grid(min_length, max_length, max_tokens), max(left, 0.3 * budget_s), say, clock, "batch"
    ), held_out


def _grid(min_length: int, max_length: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Batches of equal lengths: the shortest and the longest sequence first, then the others from short to long."""
    longest = max(min_length, min(max_length, LENGTHS[-1]))
    lengths = sorted({*(n for n in LENGTHS if min_length <= n < longest), longest})
    single = sorted(lengths, key=lambda n: n not in (lengths[0], lengths[-1]))
    # a coarser grid for batches: every second length, from the shortest
    batched = sorted(((n,) * k for k in BATCHES[1:] for n in lengths[::2]), key=sum)
    return [*((n,) for n in single), *(b for b in batched if sum(b) <= max_tokens)]


def _ragged(min_length: int, max_length: int, max_tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Batches of random lengths."""
    rng = np.random.default_rng(seed)

    def allowed(length: int) -> int:
        return max(min_length, min(length, max_length))

    made = [
        tuple(int(n) for n in rng.integers(allowed(low), allowed(high) + 1, size))
        for (low, high), size in zip(RAGGED, RAGGED_SIZES, strict=True)
    ]
    return [b for b in made if sum(b) <= max_tokens] or [(max(min_length, min(max_length, max_tokens)),)]


def _sampled(
    run: Run, batches: Sequence[tuple[int, ...]], budget_s: float, say: Say, clock: Callable[[], float], what: str
) -> list[Point]:
    """The least time of each batch, since noise only adds.

    Those that the budget does not allow for are left out, the first two never.
    """
    started, points = clock(), []
    per_token = 0.0  # of the last point: an estimate for the next
    for number, lengths in enumerate(batches):
        left = budget_s - (clock() - started)
        expected = per_token * sum(lengths)
        if number >= 2 and (left <= 0 or expected * LEAST_SAMPLES > left or expected > SHARE * budget_s):
            continue
        say(f"measuring {what} {number + 1} of {len(batches)}: {len(lengths)} x {max(lengths)} tokens")
        run(lengths)  # grows memory, and wakes the threads
        samples: list[float] = []
        while len(samples) < LEAST_SAMPLES or (len(samples) < MOST_SAMPLES and sum(samples) < SHORT_S):
            begin = clock()
            run(lengths)
            samples.append(clock() - begin)
        points.append(Point(lengths, min(samples)))
        per_token = points[-1].seconds / sum(lengths)
    return points
