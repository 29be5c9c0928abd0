"""Tasks and buckets: the kernels of a model that can be tuned, and the batches in which they are measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.errors import TuningError
from turbo_tvm.schedules.common.space import Space

# Tokens of the measured batches. A choice holds up to the geometric mean of its batch and the next.
_ROWS = (16, 64, 256, 1024)
_MOST_ROWS = 8192  # tokens of a batch that stands for all larger ones, in which only finalists are measured
_REQUESTS = (1, 4, 16, 32)  # sequences of the random batches by which buckets are weighed

USUAL_LENGTHS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Bucket:
    """Batches of similar size, of which one is measured."""

    max_rows: int | None  # tokens of the largest one; None for any number
    lengths: tuple[int, ...]  # of the sequences of the measured batch
    weight: float  # which part of all batches they are

    @property
    def rows(self) -> int:
        """Tokens of the measured batch."""
        return sum(self.lengths)


@dataclass(frozen=True)
class TuningTask:
    """A kernel to tune. Its flops and bytes are those of one call."""

    kernel: str
    recipe: KernelRecipe
    calls: int  # of a run of the model
    flops_per_token: float
    flops_per_pair: float  # of a query and a key
    bytes_weights: int
    bytes_per_token: int
    space: Space = field(compare=False)

    def flops(self, lengths: Sequence[int]) -> float:
        """Return the flops of one call on sequences of these lengths."""
        return self.flops_per_token * sum(lengths) + self.flops_per_pair * sum(n * n for n in lengths)

    def bytes(self, lengths: Sequence[int]) -> float:
        """Return the bytes that one call reads and writes at least: its weights once, and its rows."""
        return self.bytes_weights + self.bytes_per_token * sum(lengths)


def tasks_of(kernels: Iterable[KernelSpec], only: Sequence[str] = ()) -> list[TuningTask]:
    """Return the kernels that can be tuned and whose names contain one of `only`, those with most work first.

    Raises TuningError where there is none.
    """
    tasks = []
    for spec in kernels:
        if not spec.recipe or not spec.calls:
            continue
        recipe = KernelRecipe.from_json(spec.recipe)
        counts = (spec.flops_per_token, spec.flops_per_pair, spec.bytes_weights, spec.bytes_per_token)
        task = TuningTask(spec.name, recipe, spec.calls, *counts, recipe.space)
        per_token = bool(spec.flops_per_token or spec.flops_per_pair)  # else it runs on a row per sequence
        if task.space.most > 1 and per_token:
            tasks.append(task)
    chosen = [task for task in tasks if not only or any(word in task.kernel for word in only)]
    if not chosen:
        names = ", ".join(task.kernel for task in tasks) or "none"
        raise TuningError(
            f"there is nothing to tune{f' called {list(only)}' if only else ''}; kernels with knobs: {names}"
        )
    return sorted(chosen, key=lambda task: -task.calls * task.flops(USUAL_LENGTHS))


def buckets(lengths: Sequence[int], max_length: int, seed: int = 0) -> tuple[Bucket, ...]:
    """Return the buckets for requests whose lengths are distributed like `lengths`, in batches of 1 to 32 of them.

    The weight of a bucket is its share of all batches; buckets without any are left out. The last one has weight 0: it
    stands for larger batches than these, in which nothing is tried, but where a chosen setting must not lose. Raises
    TuningError if the model takes none of the lengths.
    """
    rng = np.random.default_rng(seed)
    allowed = [int(n) for n in lengths if 1 <= int(n) <= max_length]
    if not allowed:
        raise TuningError(
            f"none of the lengths {list(lengths)[:8]} is one that the model takes: 1 to {max_length} tokens"
        )
    totals = np.array([sum(rng.choice(allowed, size)) for size in _REQUESTS for _ in range(64)])
    bounds = [math.isqrt(a * b) for a, b in itertools.pairwise((*_ROWS, 4 * _ROWS[-1]))]
    places = np.searchsorted(bounds[:-1], totals)
    shares = [float((places == i).mean()) for i in range(len(_ROWS))]
    kept = [i for i, share in enumerate(shares) if share > 0]
    made = []
    for i in kept:
        made.append(Bucket(bounds[i], _batch(allowed, _ROWS[i], rng), shares[i]))
    return (*made, Bucket(None, _batch(allowed, _MOST_ROWS, rng), 0.0))


def _batch(allowed: Sequence[int], rows: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Return random lengths out of `allowed` that sum to `rows` tokens; the last one is cut."""
    made: list[int] = []
    while sum(made) < rows:
        made.append(min(int(rng.choice(allowed)), rows - sum(made)))
    return tuple(made)
