"""The tables of `turbo-tvm profile`, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from turbo_tvm.cli import numbers
from turbo_tvm.cli.console import add_row, console, print_fields, print_table, table
from turbo_tvm.profiling.roofline import KernelProfile, MachineLimits, ProfileReport

_COLUMNS = ["kernel", "calls>", "ms>", "share>", "GFLOP/s>", "GB/s>", "bound by", "floor ms>", "limit>"]
_SHOWN_LENGTHS = 12


def show(report: ProfileReport) -> None:
    """Print all tables on stdout."""
    out = console()
    print_fields(out, _overview(report))
    print_table(out, _kernels(report))
    print_fields(out, _check(report))


def _overview(r: ProfileReport) -> dict[str, str]:
    fields = {
        "model": f"{r.model}, {r.layout}",
        "batch": f"{len(r.lengths)} sequences, {r.tokens:,} tokens ({_lengths(r.lengths)}), random ids",
        "measured": f"medians of {len(r.samples['run'])} rounds, threads: {r.threads}",
    }
    return fields | ({"machine": _machine(r.limits)} if r.limits else {})


def _machine(m: MachineLimits) -> str:
    bf16 = f", bf16 {_giga(m.bf16_flops)}" if m.bf16_flops else ""
    cache = f"; {numbers.size(m.cache_bytes)} cache {_giga(m.cache)} GB/s" if m.cache else ""
    memory = f"memory {_giga(m.dram)} GB/s ({_giga(m.dram_one_thread)} with one thread)"
    return f"{m.cpu}: fp32 {_giga(m.fp32_flops)}{bf16} GFLOP/s; {memory}{cache}"


def _kernels(r: ProfileReport) -> Table:
    rows = table("Time", _COLUMNS, "kernel")
    rows.caption = "all calls of one run together; FLOPs of real tokens; limit = floor / time"
    for kernel in r.kernels:
        add_row(rows, kernel.name, str(kernel.calls), *_time(r, kernel.seconds), *_rates(kernel))
    rows.add_section()
    calls = str(sum(k.calls for k in r.kernels))
    rate = _giga(r.flops / r.kernels_s) if r.flops else ""
    add_row(rows, "kernels", calls, *_time(r, r.kernels_s), rate, "", "", *_floor(r.floor_s, r.kernels_s))
    add_row(rows, "VM between kernels", "", *_time(r, r.vm_s))
    add_row(rows, "packing and unpacking (Python)", "", *_time(r, r.python_s))
    rows.add_section()
    rate = _giga(r.flops / r.total_s) if r.flops else ""
    add_row(rows, "total", "", *_time(r, r.total_s), rate, "", "", *_floor(r.floor_s, r.total_s))
    return rows


def _check(r: ProfileReport) -> dict[str, str]:
    difference = r.total_s / r.run_s - 1
    return {
        "tokens/s": f"{r.tokens_per_s:,.0f}",
        "run() as usual": f"{1e3 * r.run_s:.3f} ms; the parts above add up to {100 * difference:+.1f} % of it",
        "the VM as usual": f"{1e3 * r.vm_call_s:.3f} ms; its kernels, one by one, {1e3 * r.kernels_s:.3f} ms",
        "the hook adds": f"{1e3 * r.hook_s:.3f} ms to a run with it, and nothing to the figures above",
    }


def _time(r: ProfileReport, seconds: float) -> tuple[str, str]:
    return f"{1e3 * seconds:.3f}", f"{100 * r.share(seconds):.1f} %"


def _rates(kernel: KernelProfile) -> tuple[str, ...]:
    rates = (_giga(kernel.flops_per_s), _giga(kernel.bytes_per_s), kernel.bound or "")
    return (*rates, *_floor(kernel.floor_s, kernel.seconds))


def _floor(floor_s: float | None, seconds: float) -> tuple[str, str]:
    return ("", "") if floor_s is None or not seconds else (f"{1e3 * floor_s:.3f}", f"{100 * floor_s / seconds:.0f} %")


def _giga(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.3g}" if rate < 99.5e9 else f"{rate / 1e9:,.0f}"


def _lengths(lengths: Sequence[int]) -> str:
    more = ", ..." if len(lengths) > _SHOWN_LENGTHS else ""
    return ", ".join(map(str, lengths[:_SHOWN_LENGTHS])) + more
