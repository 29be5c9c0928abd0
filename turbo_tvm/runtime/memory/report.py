"""The memory plan of a batch, for people and programs: where each tensor lies during a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turbo_tvm.artifact.manifest import Manifest
from turbo_tvm.errors import TurboError
from turbo_tvm.runtime import batch as packing
from turbo_tvm.runtime import validation
from turbo_tvm.runtime.memory.planner import COMPACT, STRATEGIES
from turbo_tvm.runtime.memory.table import MemoryTable


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a run, and where it lies."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    first: int  # the step that writes it
    last: int  # the last step that reads it
    size: int  # bytes
    chunk: int  # the index of its chunk
    offset: int  # bytes, within the chunk


@dataclass(frozen=True)
class MemoryReport:
    """The plan of one batch."""

    model: str
    lengths: tuple[int, ...]  # tokens of each sequence
    strategy: str
    steps: tuple[str, ...]  # the kernels of a run, in order
    tensors: tuple[TensorPlace, ...]
    chunks: tuple[int, ...]  # bytes of each
    peak: int  # bytes up to the end of the last tensor, over all chunks
    lower_bound: int  # the most bytes alive in any step, which no plan can beat

    @property
    def total(self) -> int:
        """Bytes of all tensors together: what a run would need if no memory were used twice."""
        return sum(t.size for t in self.tensors)

    @property
    def ratio(self) -> float:
        """The peak divided by the lower bound."""
        return self.peak / self.lower_bound if self.lower_bound else 1.0


def memory_report(manifest: Manifest, lengths: Sequence[int], strategy: str = "compact") -> MemoryReport:
    """Return the plan for a batch of these lengths when nothing is held yet.

    strategy: one of `planner.STRATEGIES`. Raises InputError for lengths that the model cannot answer, TurboError for a
    strategy that there is not.
    """
    if strategy not in STRATEGIES:
        raise TurboError(f"there is no memory plan {strategy!r} for a batch; use one of {', '.join(STRATEGIES)}")
    lengths = validation.check_lengths(lengths, manifest.request_limits)
    table = MemoryTable(manifest.buffers, strategy in COMPACT)
    symbols = packing.symbols(manifest.layout, manifest.row_tile, lengths)
    shapes, sizes = table.shapes(symbols), table.sizes(symbols)
    plan = STRATEGIES[strategy](table.records, sizes, ())
    tensors = tuple(
        TensorPlace(b.name, shape, b.dtype, b.first, b.last, sizes[number], *plan.places[number])
        for b, shape, number in zip(manifest.buffers, shapes, table.places, strict=True)
    )
    return MemoryReport(
        model=manifest.name,
        lengths=tuple(lengths),
        strategy=strategy,
        steps=manifest.steps,
        tensors=tensors,
        chunks=tuple(chunk.size for chunk in plan.chunks),
        peak=plan.peak,
        lower_bound=plan.lower_bound,
    )
