"""Measuring a small set of batches on the device, from which `cost_model` learns what any batch costs."""

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
SHORT_S = 0.03  # a batch is sampled for this long at least
SHARE = 0.2  # of the budget: a batch that is expected to take more for one sample is left out

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
    """Measure batches for about `budget_s` seconds: return points to fit a cost to, and ragged ones to hold out.

    run: answers a batch of these lengths.
    max_length: tokens of the longest sequence.
    max_tokens: tokens of the largest batch.
    min_length: tokens of the shortest sequence; an image has its only length.
    say: called with a line on what is being measured.

    The batches that tell most come first: single sequences, then small batches. Those that would take too long are left
    out, but a sequence of 8 tokens, one of the greatest length and a ragged batch are always measured.
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
    """Return batches of equal lengths: single sequences, the shortest and the longest first, then several by tokens."""
    longest = max(min_length, min(max_length, LENGTHS[-1]))
    lengths = sorted({*(n for n in LENGTHS if min_length <= n < longest), longest})
    single = sorted(lengths, key=lambda n: n not in (lengths[0], lengths[-1]))
    # a coarser grid for batches: every second length, from the shortest
    batched = sorted(((n,) * k for k in BATCHES[1:] for n in lengths[::2]), key=sum)
    return [*((n,) for n in single), *(b for b in batched if sum(b) <= max_tokens)]


def _ragged(min_length: int, max_length: int, max_tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Return batches of random lengths."""
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
    """Return the least time of each batch, since noise only adds to it.

    Batches that the budget does not allow for are left out, the first two never.
    """
    started, points = clock(), []
    per_token = 0.0  # seconds, by the last point: an estimate for the next
    for number, lengths in enumerate(batches):
        left = budget_s - (clock() - started)
        expected = per_token * sum(lengths)
        if number >= 2 and (left <= 0 or expected * LEAST_SAMPLES > left or expected > SHARE * budget_s):
            continue
        say(f"measuring {what} {number + 1} of {len(batches)}: {len(lengths)} x {max(lengths)} tokens")
        run(lengths)  # warm-up: memory grows and threads wake
        samples: list[float] = []
        while len(samples) < LEAST_SAMPLES or (len(samples) < MOST_SAMPLES and sum(samples) < SHORT_S):
            begin = clock()
            run(lengths)
            samples.append(clock() - begin)
        points.append(Point(lengths, min(samples)))
        per_token = points[-1].seconds / sum(lengths)
    return points
