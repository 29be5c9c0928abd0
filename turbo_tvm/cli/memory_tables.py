"""The tables of `turbo-tvm inspect --memory`, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from turbo_tvm.cli import numbers
from turbo_tvm.cli.console import add_row, console, print_fields, print_table, table
from turbo_tvm.runtime.memory.report import MemoryReport, TensorPlace


def show(reports: Sequence[MemoryReport]) -> None:
    """Print the plans on stdout, with columns of sizes and offsets per batch, since all else is the same."""
    out = console()
    print_table(out, _tensors(reports))
    for report in reports:
        print_fields(out, _totals(report))


def _tensors(reports: Sequence[MemoryReport]) -> Table:
    batches = [_lengths(r) for r in reports]
    titles = [f"{what} at {batch}>" for batch in batches for what in ("bytes", "offset")]
    rows = table(
        f"Memory of {reports[0].model}", ["name", "row", "dtype", "written by", "lives", *titles], "written by"
    )
    rows.caption = "offsets in bytes; lives: from step to step, inclusive"
    for group in zip(*(r.tensors for r in reports), strict=True):
        first = group[0]
        steps = reports[0].steps
        writer = steps[first.first] if first.first < len(steps) else ""
        lives = f"{first.first} .. {first.last}" + (" (output)" if first.last == len(steps) else "")
        row = " x ".join(map(str, first.shape[1:])) or "1"
        cells = [cell for t, r in zip(group, reports, strict=True) for cell in (f"{t.size:,}", _offset(t, r))]
        add_row(rows, first.name, row, first.dtype, writer, lives, *cells)
    return rows


def _offset(tensor: TensorPlace, report: MemoryReport) -> str:
    chunk = f"{tensor.chunk}: " if len(report.chunks) > 1 else ""
    return f"{chunk}{tensor.offset:,}"


def _totals(r: MemoryReport) -> dict[str, str]:
    return {
        f"at {_lengths(r)}": f"peak {numbers.size(r.peak)} ({r.peak:,} bytes), "
        f"{r.ratio:.3f} x the lower bound of {numbers.size(r.lower_bound)}; held: {numbers.size(sum(r.chunks))} in "
        f"{len(r.chunks)} chunk{'s' if len(r.chunks) != 1 else ''}; without reuse: {numbers.size(r.total)}",
    }


def _lengths(report: MemoryReport) -> str:
    shown = report.lengths[:4]
    return "+".join(map(str, shown)) + ("+..." if len(report.lengths) > len(shown) else "")
