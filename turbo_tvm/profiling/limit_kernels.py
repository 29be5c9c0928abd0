"""Small kernels that reach a CPU's limits: fused multiply-adds in registers, and reading memory.

Every task of a kernel is one thread's work, so `tasks` threads of TVM's pool are busy; each writes one row of `out`,
fp32 `(tasks, lanes)`, so that nothing is optimised away.
"""
# mypy: ignore-errors
# TVMScript: the bodies are parsed by TVM, not run by Python

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS, CPU_LLVM, prefetch_read
from turbo_tvm.schedules.cpu.tiles import CpuTiles

_AHEAD_FLOATS = 4096  # as the matrix kernel: the hardware's prefetchers stop at every 4 KB page
_STREAMS = 8  # vectors added up side by side


def accumulators(tiles: CpuTiles) -> int:
    """Return the number of vector registers with sums, as in the matrix kernel: 24 on AVX-512 and NEON, 12 on AVX2."""
    return tiles.tile_rows * tiles.col_tile // tiles.lanes


def multiply_add(tiles: CpuTiles) -> tvm.tirx.PrimFunc:
    """Make `(start, factors, out, rounds)`: every accumulator becomes itself * factors[0] + factors[1], `rounds` times.

    start: fp32 `(accumulators, lanes)`, all rows different, or LLVM keeps one of them; factors: fp32 `(2, lanes)`. One
    task does rounds * accumulators * lanes * 2 FLOPs. Two buffers, because TVM keeps those below 1 KB in registers.
    """
    lanes, count = tiles.lanes, accumulators(tiles)
    half = count // 2

    @T.prim_func(s_tir=True)
    def kernel(
        start: T.Buffer((count, lanes), "float32"),
        factors: T.Buffer((2, lanes), "float32"),
        out_arg: T.handle,
        rounds: T.int64,
    ):
        T.func_attr({"global_symbol": "multiply_add", "tirx.noalias": True})
        tasks = T.int64()
        out = T.match_buffer(out_arg, (tasks, lanes), "float32")
        for task in T.parallel(tasks):
            with T.sblock("task"):
                T.reads()
                T.writes()
                upper = T.sblock_alloc_buffer((half, lanes), "float32")
                lower = T.sblock_alloc_buffer((half, lanes), "float32")
                for r in T.unroll(half):
                    for c in T.vectorized(lanes):
                        upper[r, c] = start[r, c]
                    for c in T.vectorized(lanes):
                        lower[r, c] = start[half + r, c]
                for _i in range(rounds):
                    for r in T.unroll(half):
                        for c in T.vectorized(lanes):
                            upper[r, c] = upper[r, c] * factors[0, c] + factors[1, c]
                        for c in T.vectorized(lanes):
                            lower[r, c] = lower[r, c] * factors[0, c] + factors[1, c]
                for c in T.vectorized(lanes):
                    out[task, c] = T.float32(0)
                for r in T.unroll(half):
                    for c in T.vectorized(lanes):
                        out[task, c] = out[task, c] + upper[r, c] + lower[r, c]

    return kernel


def dot_bf16() -> tvm.tirx.PrimFunc:
    """Make `(start, factors, out, rounds)`: AVX-512's vdpbf16ps on 24 accumulators.

    factors: int32 `(2, 16)`, bf16 pairs; start and out as in `multiply_add`. One task does rounds * 24 * 16 * 4 FLOPs.
    Needs avx512_bf16.
    """
    half = 12

    @T.prim_func(s_tir=True)
    def kernel(
        start: T.Buffer((2 * half, 16), "float32"),
        factors: T.Buffer((2, 16), "int32"),
        out_arg: T.handle,
        rounds: T.int64,
    ):
        T.func_attr({"global_symbol": "dot_bf16", "tirx.noalias": True})
        tasks = T.int64()
        out = T.match_buffer(out_arg, (tasks, 16), "float32")
        with T.attr(T.int32(0), "pragma_import_llvm", bf16.DOT_LLVM):
            for task in T.parallel(tasks):
                with T.sblock("task"):
                    T.reads()
                    T.writes()
                    upper = T.sblock_alloc_buffer((half, 16), "float32")
                    lower = T.sblock_alloc_buffer((half, 16), "float32")
                    for r in T.unroll(half):
                        upper[r, T.ramp(0, 1, 16)] = start[r, T.ramp(0, 1, 16)]
                        lower[r, T.ramp(0, 1, 16)] = start[half + r, T.ramp(0, 1, 16)]
                    for _i in range(rounds):
                        for r in T.unroll(half):
                            upper[r, T.ramp(0, 1, 16)] = bf16.dot(
                                upper[r, T.ramp(0, 1, 16)],
                                factors[0, T.ramp(0, 1, 16)],
                                factors[1, T.ramp(0, 1, 16)],
                            )
                            lower[r, T.ramp(0, 1, 16)] = bf16.dot(
                                lower[r, T.ramp(0, 1, 16)],
                                factors[0, T.ramp(0, 1, 16)],
                                factors[1, T.ramp(0, 1, 16)],
                            )
                    out[task, T.ramp(0, 1, 16)] = T.broadcast(T.float32(0), 16)
                    for r in T.unroll(half):
                        out[task, T.ramp(0, 1, 16)] = (
                            out[task, T.ramp(0, 1, 16)] + upper[r, T.ramp(0, 1, 16)] + lower[r, T.ramp(0, 1, 16)]
                        )

    return kernel


def dot_amx() -> tvm.tirx.PrimFunc:
    """Make `(start, factors, out, rounds)`: AMX's tdpbf16ps on the matrix kernel's four accumulators, with no loads.

    start: fp32 `(64, 16)`, tiles 0-3; factors: int32 `(64, 16)`, bf16 pairs, tiles 4-7 as `schedules/amx.py` has them.
    out as in `multiply_add`: the sum of all 64 rows. One task does rounds * 64 * 16 * 64 FLOPs. Needs amx-bf16 and the
    system's permission. Four products of 16 cycles are enough to hide the 52 of one.
    """
    rows, size = 4 * amx.ROWS, amx.ROWS * amx.PAIRS

    @T.prim_func(s_tir=True)
    def kernel(
        start: T.Buffer((rows, amx.PAIRS), "float32"),
        factors: T.Buffer((rows, amx.PAIRS), "int32"),
        out_arg: T.handle,
        rounds: T.int64,
    ):
        T.func_attr({"global_symbol": "dot_amx", "tirx.noalias": True})
        tasks = T.int64()
        out = T.match_buffer(out_arg, (tasks, amx.PAIRS), "float32")
        with T.attr(T.int32(0), "pragma_import_llvm", amx.LLVM):
            for task in T.parallel(tasks):
                with T.sblock("task"):
                    T.reads()
                    T.writes()
                    sums = T.sblock_alloc_buffer((rows, amx.PAIRS), "float32")
                    shapes = T.sblock_alloc_buffer((8,), "int64")
                    amx.configure(shapes, T.int64(amx.ROWS), T.int64(amx.ROWS), amx.PAIRS)
                    amx.load(0, start, 0, amx.PAIRS)
                    amx.load(1, start, size, amx.PAIRS)
                    amx.load(2, start, 2 * size, amx.PAIRS)
                    amx.load(3, start, 3 * size, amx.PAIRS)
                    amx.load(4, factors, 0, amx.PAIRS)
                    amx.load(5, factors, size, amx.PAIRS)
                    amx.load(6, factors, 2 * size, amx.PAIRS)
                    amx.load(7, factors, 3 * size, amx.PAIRS)
                    for _i in range(rounds):
                        amx.dot(0, 4, 6)
                        amx.dot(1, 4, 7)
                        amx.dot(2, 5, 6)
                        amx.dot(3, 5, 7)
                    amx.store(0, sums, 0, amx.PAIRS)
                    amx.store(1, sums, size, amx.PAIRS)
                    amx.store(2, sums, 2 * size, amx.PAIRS)
                    amx.store(3, sums, 3 * size, amx.PAIRS)
                    amx.release()
                    for c in T.vectorized(amx.PAIRS):
                        out[task, c] = T.float32(0)
                    for r in range(rows):
                        for c in T.vectorized(amx.PAIRS):
                            out[task, c] = out[task, c] + sums[r, c]

    return kernel


def block_floats(tiles: CpuTiles) -> int:
    """Return the floats that `read` takes at a time: its array is a multiple of tasks times this long."""
    return max(_STREAMS * tiles.lanes, CACHE_LINE_FLOATS)


def read(tiles: CpuTiles) -> tvm.tirx.PrimFunc:
    """Make `(data, out, rounds)`: every task adds up its part of data, fp32 `(blocks, block)`, `rounds` times."""
    lanes, block = tiles.lanes, block_floats(tiles)
    streams, lines = block // lanes, block // CACHE_LINE_FLOATS

    @T.prim_func(s_tir=True)
    def kernel(data_arg: T.handle, out_arg: T.handle, rounds: T.int64):
        T.func_attr({"global_symbol": "read", "tirx.noalias": True})
        blocks, tasks = T.int64(), T.int64()
        data = T.match_buffer(data_arg, (blocks, block), "float32")
        out = T.match_buffer(out_arg, (tasks, lanes), "float32")
        with T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM):
            for task in T.parallel(tasks):
                with T.sblock("task"):
                    T.reads()
                    T.writes()
                    acc = T.sblock_alloc_buffer((streams, lanes), "float32")
                    each: T.let = blocks // tasks
                    for r in T.unroll(streams):
                        for c in T.vectorized(lanes):
                            acc[r, c] = T.float32(0)
                    for _round in range(rounds):
                        for i in range(each):
                            for line in T.unroll(lines):
                                prefetch_read(
                                    data, (task * each + i) * block + line * CACHE_LINE_FLOATS + _AHEAD_FLOATS
                                )
                            for r in T.unroll(streams):
                                for c in T.vectorized(lanes):
                                    acc[r, c] = acc[r, c] + data[task * each + i, r * lanes + c]
                    for c in T.vectorized(lanes):
                        out[task, c] = T.float32(0)
                    for r in T.unroll(streams):
                        for c in T.vectorized(lanes):
                            out[task, c] = out[task, c] + acc[r, c]

    return kernel
