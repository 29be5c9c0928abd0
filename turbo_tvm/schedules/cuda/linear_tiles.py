"""Tiles of x and W on their way from memory to shared memory, and results on their way back: the matrix kernel's ends.

Numbered steps in the bodies are those of the strategy in `linear.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import formats
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.common.vector_math import activation as activation_by_name
from turbo_tvm.schedules.cuda.block_product import BlockProduct
from turbo_tvm.schedules.cuda.numbers import from_float, to_float
from turbo_tvm.schedules.cuda.products import Memory
from turbo_tvm.schedules.cuda.reduction import ACCESS_BYTES, vector_width
from turbo_tvm.schedules.cuda.script import operand_type


@dataclass(frozen=True)
class Product:
    """What a matrix kernel computes, how its rows are stored, and what a block does of it."""

    block: BlockProduct
    k: int
    n: int
    x: Operand
    extra: Operand | None  # the residual's rows, where there is one
    out: Operand
    activation: str | None

    @property
    def dtype(self) -> str:
        """Return the dtype of x and W as TVM calls it."""
        return operand_type(self.x.dtype)

    @property
    def steps(self) -> int:
        """Return how many tiles k has; the last one may be cut."""
        return -(-self.k // self.block.depth)

    @property
    def whole_k(self) -> bool:
        """Return whether k is whole tiles."""
        return self.k % self.block.depth == 0

    @property
    def x_vector(self) -> int:
        """Return the elements of x per access."""
        return vector_width(self.k, self.x)

    @property
    def x_pieces(self) -> int:
        """Return the accesses of a thread to a tile of x."""
        return self.block.rows * self.block.depth // self.x_vector // self.block.threads

    @property
    def w_vector(self) -> int:
        """Return the elements of W per access."""
        return ACCESS_BYTES // self.x.itemsize

    @property
    def w_pieces(self) -> int:
        """Return the accesses of a thread to a tile of W."""
        return self.block.depth * self.block.columns // self.w_vector // self.block.threads

    @property
    def out_vector(self) -> int:
        """Return how many neighbours in a row of the output are finished together."""
        return min(self.block.widest, vector_width(self.n, self.out, *((self.extra,) if self.extra else ())))


@dataclass(frozen=True)
class Operands:
    """The buffers of a call."""

    x: tvm.tirx.Buffer
    weight: tvm.tirx.Buffer
    bias: tvm.tirx.Buffer
    residual: tvm.tirx.Buffer
    out: tvm.tirx.Buffer


@dataclass(frozen=True)
class Tile:
    """Which tile of the output a block computes."""

    first_row: Expr
    panel: Expr
    count: Expr  # rows of x

    def row(self, index: Expr) -> Expr:
        """Return a row of x to read: the last one stands for those past the end."""
        return T.min(self.first_row + index, self.count - 1)


def load_tiles_macro(product: Product) -> Macro:
    """Return `load(memory, operands, tile, thread, step)`: bring a thread's parts of the tiles of x and W to registers.

    thread: its number. step: which tile of k. Columns of x and rows of W beyond k are zeros.
    """
    k, depth, columns, threads = product.k, product.block.depth, product.block.columns, product.block.threads
    x_vector, w_vector, whole_k = product.x_vector, product.w_vector, product.whole_k

    @T.inline
    def load(memory, operands, tile, thread, step):
        # 2. the next tiles, on their way
        for i in T.unroll(product.x_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(tile.row(piece // (depth // x_vector)))
            column = T.meta_var(step * depth + piece % (depth // x_vector) * x_vector)
            if whole_k:
                for j in T.vectorized(x_vector):
                    memory.x_held[i * x_vector + j] = operands.x[row, 0, column + j]
            else:
                if column < k:
                    for j in T.vectorized(x_vector):
                        memory.x_held[i * x_vector + j] = operands.x[row, 0, column + j]
                else:
                    for j in T.unroll(x_vector):
                        memory.x_held[i * x_vector + j] = T.cast(T.float32(0), product.dtype)
        for i in T.unroll(product.w_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(step * depth + piece // (columns // w_vector))
            column = T.meta_var(piece % (columns // w_vector) * w_vector)
            if whole_k:
                for j in T.vectorized(w_vector):
                    memory.w_held[i * w_vector + j] = operands.weight[tile.panel, row, column + j]
            else:
                if row < k:
                    for j in T.vectorized(w_vector):
                        memory.w_held[i * w_vector + j] = operands.weight[tile.panel, row, column + j]
                else:
                    for j in T.unroll(w_vector):
                        memory.w_held[i * w_vector + j] = T.cast(T.float32(0), product.dtype)

    return load


def keep_tiles_macro(product: Product) -> Macro:
    """Return `keep(memory, thread, side)`: store a thread's parts in one of the two tiles of x and of W."""
    depth, columns, threads = product.block.depth, product.block.columns, product.block.threads
    x_vector, w_vector = product.x_vector, product.w_vector

    @T.inline
    def keep(memory, thread, side):
        # 2. from registers to shared memory
        for i in T.unroll(product.x_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(piece // (depth // x_vector))
            column = T.meta_var(piece % (depth // x_vector) * x_vector)
            if product.block.transposed:
                for j in T.unroll(x_vector):
                    memory.x_tile[side, column + j, row] = memory.x_held[i * x_vector + j]
            else:
                for j in T.vectorized(x_vector):
                    memory.x_tile[side, row, column + j] = memory.x_held[i * x_vector + j]
        for i in T.unroll(product.w_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(piece // (columns // w_vector))
            column = T.meta_var(piece % (columns // w_vector) * w_vector)
            for j in T.vectorized(w_vector):
                memory.w_tile[side, row, column + j] = memory.w_held[i * w_vector + j]

    return keep


def store_macro(product: Product, memory: Memory, operands: Operands, tile: Tile) -> Macro:
    """Return `store(row, place_in_panel)`: finish memory.values, which are neighbours in a row of the tile."""
    n, columns, vector = product.n, product.block.columns, product.out_vector
    values, residual, out = memory.values, product.extra, product.out
    activate = activation_by_name(product.activation, formats.of_storage(out.dtype))

    @T.inline
    def store(row, place_in_panel):
        column = T.meta_var(tile.panel * columns + place_in_panel)
        # 4. bias, activation and residual in fp32, then one access
        if tile.first_row + row < tile.count:  # noqa: SIM102  TVMScript knows no `and`
            if column < n:
                with T.sblock("store"):
                    T.reads()
                    T.writes()
                    shift = T.sblock_alloc_buffer((vector,), "float32", scope="local")
                    raw = T.sblock_alloc_buffer((vector,), out.dtype, scope="local")
                    for i in T.unroll(max(1, vector // 4)):
                        for j in T.vectorized(min(vector, 4)):
                            shift[i * 4 + j] = operands.bias[column + i * 4 + j]
                    for j in T.unroll(vector):
                        values[j] = values[j] + shift[j]
                    for j in T.unroll(vector):
                        values[j] = activate(values[j])
                    if residual is not None:
                        held = T.sblock_alloc_buffer((vector,), residual.dtype, scope="local")
                        for j in T.vectorized(vector):
                            held[j] = operands.residual[tile.first_row + row, 0, column + j]
                        for j in T.unroll(vector):
                            values[j] = values[j] + to_float(held[j], residual.dtype)
                    for j in T.unroll(vector):
                        raw[j] = from_float(values[j], out.dtype)
                    for j in T.vectorized(vector):
                        operands.out[tile.first_row + row, 0, column + j] = raw[j]

    return store
