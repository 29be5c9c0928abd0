"""The buffers of a compiled function as the memory planner wants them: lifetimes, and sizes for a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from turbo_tvm.artifact.manifest import BufferSpec
from turbo_tvm.runtime.memory.planner import Record

Symbols = Mapping[str, int]  # the value of every symbol that the shapes name


class MemoryTable:
    """The lifetimes and sizes of a function's buffers.

    records: the lifetime of every place.
    places: the number of the place of every buffer, in call order.
    dtypes: the dtype of every buffer, in call order.

    in_place: whether a buffer takes the place of the one that it may replace; the place then lives as long as both.
    """

    def __init__(self, buffers: Sequence[BufferSpec], in_place: bool = True):
        self.dtypes = tuple(np.dtype(b.dtype) for b in buffers)
        self._shapes = tuple(tuple(_factors(d) for d in b.shape) for b in buffers)
        places: dict[str, int] = {}
        records: list[Record] = []
        for b in buffers:
            if in_place and b.replaces is not None:
                number = places[b.replaces]
                records[number] = Record(records[number].first, b.last)
            else:
                number = len(records)
                records.append(Record(b.first, b.last))
            places[b.name] = number
        self.records = tuple(records)
        self.places = tuple(places[b.name] for b in buffers)
        self._owners = tuple(self.places.index(number) for number in range(len(records)))

    def shapes(self, symbols: Symbols) -> list[tuple[int, ...]]:
        """Return the shape of every buffer. KeyError where a symbol has no value."""
        return [tuple(n * math.prod(symbols[s] for s in names) for n, names in shape) for shape in self._shapes]

    def sizes(self, symbols: Symbols) -> list[int]:
        """Return the bytes of every place, by its number."""
        shapes = self.shapes(symbols)
        return [math.prod(shapes[i]) * self.dtypes[i].itemsize for i in self._owners]


def _factors(product: str) -> tuple[int, tuple[str, ...]]:
    """Split a product: "12*batch" --> (12, ("batch",))."""
    factors = product.split("*")
    numbers = [int(f) for f in factors if f.isdecimal()]
    return math.prod(numbers), tuple(f for f in factors if not f.isdecimal())
