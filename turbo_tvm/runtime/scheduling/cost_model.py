"""Cost models: `cost(lengths) -> seconds` that a batch takes, all that the scheduler knows about a model.

There are two kinds, each fitted to a few measured batches; `fit` takes the one that predicts held-out batches better.

- `PackedCost`, for execution without padding: a fixed term, one per sequence, one that is piecewise linear in tokens,
  and one in squared lengths, which is attention's.
- `PaddedCost`: a table by length of the longest sequence and by batch, interpolated (`cached_cost[length][batch]`
  of Fang et al., "TurboTransformers", PPoPP 2021).

`RefinedCost` corrects either by what live batches take. All of them price whole arrays of batches at once (`batches`),
for `partition`.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbo_tvm.artifact.cost_spec import CostSpec
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.partition import Cost

KNOTS = (16, 64, 256)  # tokens where the cost of a further token may change
TABLE_BATCHES = (1, 4, 16, 64)  # what a table has columns for at least, measured or not
SWEEPS = 2000  # of coordinate descent; some hundreds are enough for eight terms

STEP = 16  # tokens per entry of the table of corrections
LARGEST = 1 << 14  # tokens; larger batches are corrected like these
RATE = 0.1  # the part of a batch's surprise that the correction follows
SURPRISE = 0.3  # the most that one batch counts as a surprise, as a logarithm: an outlier moves the cost by 3 %
BOUND = math.log(4)  # the most that either end of the correction may become, as a logarithm
TILT = math.log(2)  # the most that either end may differ from their middle, as a logarithm


@dataclass(frozen=True)
class Point:
    """A measured batch."""

    lengths: tuple[int, ...]  # tokens of each sequence
    seconds: float  # that it took


class PackedCost:
    """The cost fixed + per_sequence * sequences + f(tokens) + per_square * sum of squared lengths, in seconds.

    f is piecewise linear with slopes[i], seconds per token, up to knots[i] tokens, and the last slope beyond.
    """

    def __init__(self, spec: CostSpec):
        self.spec = spec
        self._fixed, self._sequence, self._square, *slopes = spec.terms
        self._starts = (0, *spec.knots)
        widths = np.diff(self._starts)
        self._values = np.concatenate(([0.0], np.cumsum(np.array(slopes[:-1]) * widths))).tolist()
        self._slopes = slopes

    def __call__(self, lengths: Sequence[int]) -> float:
        """Return the seconds for a batch of these lengths."""
        tokens, squares = sum(lengths), sum(n * n for n in lengths)
        i = bisect_right(self._starts, tokens) - 1
        of_tokens = self._values[i] + self._slopes[i] * (tokens - self._starts[i])
        return self._fixed + self._sequence * len(lengths) + of_tokens + self._square * squares

    def batches(self, counts: np.ndarray, tokens: np.ndarray, squares: np.ndarray, longest: np.ndarray) -> np.ndarray:
        """Return the seconds of many batches, float64, from int64 arrays of what each amounts to."""
        total = self._fixed + self._sequence * counts + self._square * squares + self._slopes[0] * tokens
        for start, before, after in zip(self._starts[1:], self._slopes, self._slopes[1:], strict=False):
            if after != before:
                total += (after - before) * np.maximum(tokens - start, 0)
        return total

    @staticmethod
    def fit(points: Sequence[Point]) -> PackedCost:
        """Fit the terms to measured batches: least squares of the relative error, no term negative."""
        most = max(sum(p.lengths) for p in points)
        knots = tuple(k for k in KNOTS if k < most)
        rows = np.array([_packed_terms(p.lengths, knots) for p in points])
        seconds = np.array([p.seconds for p in points])
        terms = _non_negative_least_squares(rows / seconds[:, None], np.ones(len(points)))
        return PackedCost(CostSpec("packed", terms=tuple(terms.tolist()), knots=knots))


class PaddedCost:
    """The cost by a table in seconds over length and batch: linear between its entries, proportional beyond them."""

    def __init__(self, spec: CostSpec):
        self.spec = spec
        self._lengths, self._batches = np.array(spec.lengths, float), np.array(spec.batches, float)
        self._seconds = np.array(spec.seconds)

    def __call__(self, lengths: Sequence[int]) -> float:
        """Return the seconds for a batch of these lengths, padded to the longest."""
        return float(self.batches(np.array([len(lengths)]), None, None, np.array([max(lengths)]))[0])

    def batches(self, counts: np.ndarray, tokens: Any, squares: Any, longest: np.ndarray) -> np.ndarray:
        """Return the seconds of many batches, float64, from int64 arrays of what each amounts to."""
        i, u, more = _place(self._lengths, longest)
        j, v, further = _place(self._batches, counts)
        table = self._seconds
        low = table[i, j] * (1 - v) + table[i, j + 1] * v
        high = table[i + 1, j] * (1 - v) + table[i + 1, j + 1] * v
        return (low * (1 - u) + high * u) * more * further

    @staticmethod
    def fit(points: Sequence[Point]) -> PaddedCost:
        """Make a table of the batches of equal lengths. Entries that were not measured are `PackedCost`s of rectangles.

        Raises InputError without any batch of equal lengths.
        """
        equal = {(p.lengths[0], len(p.lengths)): p.seconds for p in points if len(set(p.lengths)) == 1}
        if not equal:
            raise InputError("a table of costs needs measured batches of equal lengths")
        lengths = tuple(sorted({n for n, _ in equal}))
        if len(lengths) == 1:
            lengths = (lengths[0], lengths[0] + 1)
        counts = tuple(sorted({*TABLE_BATCHES, *(k for _, k in equal)}))
        whole = [Point((max(p.lengths),) * len(p.lengths), p.seconds) for p in points]
        guess = PackedCost.fit(whole)
        rows = np.array([[equal.get((n, k)) or guess((n,) * k) for k in counts] for n in lengths])
        grown = np.maximum.accumulate(np.maximum.accumulate(rows, 0), 1)  # no cheaper for being larger
        table = tuple(tuple(row) for row in grown.tolist())
        return PaddedCost(CostSpec("padded", lengths=lengths, batches=counts, seconds=table))


class RefinedCost:
    """A cost, corrected by what live batches take, slowly and within bounds. Thread-safe.

    The correction is a factor whose logarithm is linear in the logarithm of the batch's tokens, two numbers in all:
    more of them would follow the noise, and a policy would find gains in it.
    """

    def __init__(self, base: Cost):
        self.base = base
        self.batches = self._batches if hasattr(base, "batches") else None
        tokens = np.maximum(np.arange(LARGEST // STEP + 1) * STEP, STEP // 2)
        self._places = np.log2(tokens) / math.log2(LARGEST)  # 0 for a token, 1 for the largest batch
        self._ends: tuple[float, ...] = (0.0, 0.0)
        self._factors = np.ones(len(tokens))
        self._lock = threading.Lock()

    def __call__(self, lengths: Sequence[int]) -> float:
        """Return the seconds for a batch of these lengths."""
        return self.base(lengths) * float(self._factors[min(sum(lengths), LARGEST) // STEP])

    def _batches(self, counts: np.ndarray, tokens: np.ndarray, squares: np.ndarray, longest: np.ndarray) -> np.ndarray:
        """Return the seconds of many batches, if the base can."""
        factors = self._factors[np.minimum(tokens, LARGEST) // STEP]
        return self.base.batches(counts, tokens, squares, longest) * factors  # type: ignore[attr-defined]

    def observe(self, lengths: Sequence[int], seconds: float) -> None:
        """Learn from a batch of these lengths that it took this long."""
        if not 0 < seconds < math.inf:
            return
        with self._lock:
            predicted = self(lengths)
            if not 0 < predicted < math.inf:  # a cost that is not ours may say anything
                return
            surprise = max(-SURPRISE, min(SURPRISE, math.log(seconds / predicted)))
            place = float(self._places[min(sum(lengths), LARGEST) // STEP])
            low, high = self._ends
            step = RATE * surprise / (place**2 + (1 - place) ** 2)
            self._set(low + step * (1 - place), high + step * place)

    @staticmethod
    def fitted(base: Cost, batches: Sequence[tuple[Sequence[int], float]]) -> RefinedCost:
        """Return the cost with the correction that fits these (lengths, seconds); their total time is then exact."""
        made = RefinedCost(base)
        places = np.array([made._places[min(sum(lengths), LARGEST) // STEP] for lengths, _ in batches])
        predicted = np.array([base(lengths) for lengths, _ in batches])
        seconds = np.array([s for _, s in batches])
        weights = np.sqrt(seconds)
        rows = np.stack((1 - places, places), 1) * weights[:, None]
        surprises = np.clip(np.log(seconds / predicted), -BOUND, BOUND) * weights
        # a prior of half a batch without correction at either end, for when all sizes are alike
        prior = np.eye(2) * weights.mean() / 2
        rows, wanted = np.concatenate((rows, prior)), np.concatenate((surprises, [0.0, 0.0]))
        (low, high), *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        factors = np.exp(low + (high - low) * places)
        missing = math.log(seconds.sum() / (predicted * factors).sum())
        made._set(low + missing, high + missing)
        return made

    def _set(self, low: float, high: float) -> None:
        middle, half = (low + high) / 2, max(-TILT, min(TILT, (high - low) / 2))
        self._ends = tuple(max(-BOUND, min(BOUND, value)) for value in (middle - half, middle + half))
        self._factors = np.exp(self._ends[0] + (self._ends[1] - self._ends[0]) * self._places)

    @property
    def corrections(self) -> tuple[float, float]:
        """The correction's factor for a single token, and for the largest batches."""
        return math.exp(self._ends[0]), math.exp(self._ends[1])


KINDS: dict[str, type[PackedCost] | type[PaddedCost]] = {"packed": PackedCost, "padded": PaddedCost}


def cost_of(spec: CostSpec) -> PackedCost | PaddedCost:
    """Return the cost that a record in a manifest describes."""
    return KINDS[spec.kind](spec)


def fit(points: Sequence[Point], held_out: Sequence[Point]) -> CostSpec:
    """Fit the kind of cost that predicts held-out batches better to all batches; its error is that on held-out ones."""
    errors = {name: mean_error(kind.fit(points), held_out) for name, kind in KINDS.items()}
    best = min(errors, key=lambda name: errors[name])
    fitted = KINDS[best].fit([*points, *held_out]).spec
    return CostSpec(
        kind=fitted.kind,
        terms=fitted.terms,
        knots=fitted.knots,
        lengths=fitted.lengths,
        batches=fitted.batches,
        seconds=fitted.seconds,
        error=errors[best],
        points=len(points) + len(held_out),
    )


def mean_error(cost: Cost, points: Sequence[Point]) -> float:
    """Return the mean of |predicted - measured| / measured over these batches."""
    return sum(abs(cost(p.lengths) - p.seconds) / p.seconds for p in points) / len(points)


def _packed_terms(lengths: Sequence[int], knots: Sequence[int]) -> list[float]:
    """Return the factor of each term of a PackedCost, for a batch of these lengths."""
    tokens, starts, ends = sum(lengths), (0, *knots), (*knots, math.inf)
    parts = [max(0.0, min(tokens, end) - start) for start, end in zip(starts, ends, strict=True)]
    return [1.0, len(lengths), float(sum(n * n for n in lengths)), *parts]


def _non_negative_least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return x >= 0 with the least |rows @ x - wanted|, by coordinate descent: the columns are few."""
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-300)
    scaled = rows / scale
    gram, right = scaled.T @ scaled, scaled.T @ wanted
    x = np.zeros(len(right))
    for _ in range(SWEEPS):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + right[i] - gram[i] @ x)
        if np.abs(x - before).max() < 1e-12 * max(1.0, np.abs(x).max()):
            break
    return x / scale


def _place(grid: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, per value, its interval in the grid, the fraction within, and its multiple of the end if larger."""
    within = np.clip(values, grid[0], grid[-1])
    i = np.clip(np.searchsorted(grid, within, "right") - 1, 0, len(grid) - 2)
    return i, (within - grid[i]) / (grid[i + 1] - grid[i]), np.maximum(values / grid[-1], 1.0)
