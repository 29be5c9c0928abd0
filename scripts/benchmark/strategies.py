"""How a rival that needs rectangles answers requests of different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .workloads import RAGGED, Workload

RAGGED_INPUT = "ragged"
PADDED, ONE_BY_ONE = "padded", "one by one"
GROUP_SIZES = {"sorted, groups of 4": 4, "sorted, groups of 8": 8}
STRATEGIES = (PADDED, ONE_BY_ONE, *GROUP_SIZES)


@dataclass(frozen=True)
class Rectangle:
    """Sequences padded to the longest of them; `rows` are their places in the request list."""

    ids: np.ndarray
    mask: np.ndarray
    rows: tuple[int, ...]


def for_workload(workload: Workload) -> tuple[str, ...]:
    """All strategies for ragged sets; where the lengths are equal the padded rectangle has no padding."""
    return STRATEGIES if workload.kind == RAGGED else (PADDED,)


def rectangles(strategy: str, sequences: list[np.ndarray]) -> list[Rectangle]:
    """What the rival is called with, in order."""
    everything = list(range(len(sequences)))
    if strategy == PADDED:
        return [_rectangle(sequences, everything)]
    if strategy == ONE_BY_ONE:
        return [_rectangle(sequences, [i]) for i in everything]
    size = GROUP_SIZES[strategy]
    by_length = sorted(everything, key=lambda i: len(sequences[i]))
    return [_rectangle(sequences, by_length[i : i + size]) for i in range(0, len(by_length), size)]


def _rectangle(sequences: list[np.ndarray], rows: list[int]) -> Rectangle:
    width = max(len(sequences[i]) for i in rows)
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for row, i in enumerate(rows):
        ids[row, : len(sequences[i])], mask[row, : len(sequences[i])] = sequences[i], 1
    return Rectangle(ids, mask, tuple(rows))
