"""Where the heads of an attention come from: which columns of which rows, and how they were turned by position.

    reshape, permute, split, squeeze, slices, repeat, broadcast of `rows` (b, s, width)    --> rows, first column, heads
    a * cos(position_ids) + rotate_half(a) * sin(position_ids), a of the same kind         --> the same, and a table

There are many ways to cut rows into heads, and to share heads of keys among those of queries. So numbers are sent
through whatever moves elements without changing them, and what comes out says where each came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax, tirx
from tvm.sym.analyzer import Analyzer

from turbo_tvm.ops.inputs import input_params
from turbo_tvm.passes.analysis.evaluate import cut, evaluate, specialized
from turbo_tvm.passes.rewriter import Rewriter, is_call, same_shape, shape_of

_BATCH, _LENGTH = 2, 5  # of the numbers, where they are symbolic

_RESHAPED = ("reshape", "expand_dims", "squeeze")
_MOVES = (*_RESHAPED, "permute_dims", "broadcast_to", "repeat", "strided_slice")


@dataclass(frozen=True)
class HeadOperand:
    """Heads of an attention, as columns of rows: head h begins at `first_column + h // group * head_dim`.

    rows: (batch, length, width). heads: how many there are, before each stands for a group. table: (positions, dims),
    the cosines and the sines by which the first dims columns of each head are turned, or None.
    """

    rows: relax.Expr
    first_column: int
    heads: int
    head_dim: int
    table: relax.Expr | None = None

    @property
    def width(self) -> int:
        """Columns of the rows."""
        return int(shape_of(self.rows)[-1])


class HeadOperands:
    """Finds operands in the function that a rewriter is rebuilding.

    tokens: batch and length; that of images is a number. max_length: positions of a table. position_ids: that input, if
    there is one.
    """

    def __init__(self, rewriter: Rewriter, tokens: tuple, max_length: int, position_ids: relax.Var | None):
        self.rewriter, self.tokens, self.max_length = rewriter, tokens, max_length
        self.position_ids = position_ids
        self._tables: dict[tuple[relax.Expr, relax.Expr], relax.Expr | None] = {}
        self._analyzer = Analyzer()
        self.batch, self.length = (
            dim if isinstance(dim, int) else size for dim, size in zip(tokens, (_BATCH, _LENGTH), strict=True)
        )
        for dim, size in zip(tokens, (self.batch, self.length), strict=True):
            if not isinstance(dim, int):
                self._analyzer.bind(dim, tirx.IntImm("int64", size))

    def find(self, x: relax.Expr) -> HeadOperand | None:
        """The operand `x`, (batch, length, heads, head_dim); None if its elements are not simply columns of rows."""
        turned = self._source(x, lambda expr: is_call(self.rewriter.definition(expr), "add"))
        rotation = self._rotation(turned) if turned is not None else None
        start, table = rotation if rotation is not None else (x, None)
        rows = self._source(start, self._is_rows)
        if rows is None:
            return None
        count = self.batch * self.length * int(shape_of(rows)[-1])
        numbers = np.arange(count).reshape(self.batch, self.length, -1)
        sent = self._send(start, {rows: numbers})
        if rotation is not None and sent is not None and turned is not None:
            sent = self._send(x, {turned: sent})
        return self._columns(sent, rows, table) if sent is not None else None

    def _columns(self, sent: np.ndarray, rows: relax.Expr, table: relax.Expr | None) -> HeadOperand | None:
        width = int(shape_of(rows)[-1])
        if sent.ndim != 4 or sent.shape[:2] != (self.batch, self.length):
            return None
        columns, head_dim = sent[0, 0], sent.shape[3]
        group = int((columns[:, 0] == columns[0, 0]).sum())
        first, heads = int(columns[0, 0]), len(columns) // group
        expected = first + np.arange(len(columns))[:, None] // group * head_dim + np.arange(head_dim)
        tokens = np.arange(self.batch * self.length).reshape(self.batch, self.length, 1, 1) * width
        if not np.array_equal(sent, tokens + expected):
            return None
        return HeadOperand(rows, first, heads, head_dim, table)

    def _source(self, x: relax.Expr, accepted: Callable[[relax.Expr], bool]) -> relax.Expr | None:
        """The last expression on the way back through mere moves that is accepted."""
        found = None
        while True:
            if accepted(x):
                found = x
            value = self.rewriter.definition(x)
            if isinstance(value, relax.TupleGetItem):
                value = self.rewriter.definition(value.tuple_value)
                if not is_call(value, "split"):
                    return found
            elif not any(is_call(value, op) for op in _MOVES):
                return found
            x = value.args[0]

    def _is_rows(self, x: relax.Expr) -> bool:
        shape = shape_of(x)
        return len(shape) == 3 and isinstance(shape[2], int) and same_shape(shape[:2], list(self.tokens))

    def _send(self, x: relax.Expr, known: dict[relax.Expr, np.ndarray]) -> np.ndarray | None:
        """The numbers `known` after the moves (and negations and concatenations) that lead to `x`."""
        if x in known:
            return known[x]
        value = self.rewriter.definition(x)
        if isinstance(value, relax.TupleGetItem):
            return self._send_split(value, known)
        if is_call(value, "concat"):
            parts = [self._send(part, known) for part in self._fields(value.args[0])]
            known_parts = [part for part in parts if part is not None]
            return np.concatenate(known_parts, int(value.attrs.axis)) if len(known_parts) == len(parts) else None
        if not any(is_call(value, op) for op in (*_MOVES, "negative")):
            return None
        source = self._send(value.args[0], known)
        return self._moved(x, value, source) if source is not None else None

    def _fields(self, x: relax.Expr) -> list[relax.Expr]:
        value = self.rewriter.definition(x)
        return list(value.fields) if isinstance(value, relax.Tuple) else [x]

    def _moved(self, x: relax.Expr, call: relax.Call, source: np.ndarray) -> np.ndarray | None:
        if is_call(call, "negative"):
            return -source
        if is_call(call, "permute_dims"):
            return source.transpose([int(a) for a in call.attrs.axes] if call.attrs.axes is not None else None)
        if is_call(call, "repeat"):
            axis = call.attrs.axis
            return np.repeat(source, int(call.attrs.repeats), None if axis is None else int(axis))
        if is_call(call, "strided_slice"):
            return _sliced(call, source)
        shape = self._shape(x)
        if shape is None:
            return None
        return np.broadcast_to(source, shape) if is_call(call, "broadcast_to") else source.reshape(shape)

    def _send_split(self, item: relax.TupleGetItem, known: dict[relax.Expr, np.ndarray]) -> np.ndarray | None:
        split = self.rewriter.call_of(item.tuple_value, "split")
        source = self._send(split.args[0], known) if split is not None else None
        if split is None or source is None:
            return None
        sections = split.attrs.indices_or_sections
        cuts = int(sections) if isinstance(sections, int | tirx.IntImm) else [int(i) for i in sections]
        return np.split(source, cuts, int(split.attrs.axis))[int(item.index)]

    def _shape(self, x: relax.Expr) -> list[int] | None:
        """The shape of an expression where batch and length are those of the numbers."""
        found = [d if isinstance(d, int) else self._analyzer.simplify(d) for d in shape_of(x)]
        return [int(d) for d in found] if all(isinstance(d, int | tirx.IntImm) for d in found) else None

    def _rotation(self, turned: relax.Expr) -> tuple[relax.Expr, relax.Expr] | None:
        """(a, table) where `turned` is a * cos + rotate_half(a) * sin."""
        found = [self.rewriter.call_of(term, "multiply") for term in self.rewriter.definition(turned).args]
        products = [product for product in found if product is not None]
        if len(products) < 2:
            return None
        for first, second in (products, products[::-1]):
            for a, cosine in (first.args, reversed(first.args)):
                for rotated, sine in (second.args, reversed(second.args)):
                    if self._is_half_turn(a, rotated):
                        table = self._table(a, cosine, sine)
                        return (a, table) if table is not None else None
        return None

    def _is_half_turn(self, a: relax.Expr, rotated: relax.Expr) -> bool:
        """Whether the second half of a's columns, negative, comes before the first."""
        shape = self._shape(a)
        if shape is None or len(shape) != 4 or shape[-1] % 2:
            return False
        numbers = np.arange(1, 1 + np.prod(shape)).reshape(shape)
        half = shape[-1] // 2
        got = self._send(rotated, {a: numbers})
        return got is not None and np.array_equal(got, np.concatenate([-numbers[..., half:], numbers[..., :half]], -1))

    def _table(self, a: relax.Expr, cosine: relax.Expr, sine: relax.Expr) -> relax.Expr | None:
        """The cosines and sines of all positions, as one expression of weights (max_length, head_dim)."""
        parts = [self._angles(x, a) for x in (cosine, sine)]
        if parts[0] is None or parts[1] is None:
            return None
        key = (parts[0], parts[1])
        if key not in self._tables:
            halves = [self._by_position(part) for part in key]
            both = None if any(half is None for half in halves) else relax.op.concat(halves, axis=1)
            self._tables[key] = self.rewriter.emit(both) if both is not None else None
        return self._tables[key]

    def _angles(self, x: relax.Expr, a: relax.Expr) -> relax.Expr | None:
        """The (batch, length, head_dim) that stands before each head of a, if that is what x is."""
        base = self._source(x, self._is_rows)
        shape, target = (self._shape(base) if base is not None else None), self._shape(a)
        if base is None or shape is None or target is None:
            return None
        numbers = np.arange(np.prod(shape)).reshape(shape)
        sent = self._send(x, {base: numbers})
        if sent is None or sent.ndim != 4:
            return None
        tokens_first = same_shape([shape_of(a)[1]], [self.tokens[1]])  # else (batch, heads, length, head_dim)
        expected = numbers[:, :, None] if tokens_first else numbers[:, None]
        return base if np.array_equal(np.broadcast_to(sent, target), np.broadcast_to(expected, target)) else None

    def _by_position(self, angles: relax.Expr) -> relax.Expr | None:
        """The first half of the columns of `angles` for every position, as an expression of weights.

        None if they depend on anything else than a token's position id, or if their second half is another.
        """
        if self.position_ids is None or not self._depends_on_positions(angles):
            return None
        ids = np.random.default_rng(0).integers(0, self.max_length, _LENGTH)
        places = np.array([range(_LENGTH), [2, 2, 0, 4, 1]])  # each id at several places
        some = self._measured(angles, ids[places])
        if some is None or not np.allclose(some, some[0][places]):
            return None
        half = some.shape[-1] // 2
        if not np.array_equal(some[..., :half], some[..., half:]):
            return None
        every = np.arange(self.max_length).reshape(1, -1)
        constant = {self.position_ids: relax.const(every, str(self.position_ids.ty.dtype))}
        whole = specialized(self.rewriter, angles, dict(zip(self.tokens, every.shape, strict=True)), constant)
        emit = self.rewriter.emit
        flat = emit(relax.op.reshape(whole, (self.max_length, 2 * half)))
        return emit(relax.op.strided_slice(flat, [1], [0], [half]))

    def _depends_on_positions(self, angles: relax.Expr) -> bool:
        inputs = input_params(self.rewriter.func)
        read = [p for p in cut(self.rewriter, angles)[0] if any(p.same_as(i) for i in inputs)]
        return len(read) == 1 and read[0].same_as(self.position_ids)

    def _measured(self, angles: relax.Expr, ids: np.ndarray) -> np.ndarray | None:
        rng = np.random.default_rng(1)

        def value_of(param: relax.Var) -> np.ndarray:
            if param.same_as(self.position_ids):
                return ids.astype(str(param.ty.dtype))
            return rng.standard_normal([int(d) for d in shape_of(param)]).astype(str(param.ty.dtype))

        return evaluate(self.rewriter, angles, dict(zip(self.tokens, ids.shape, strict=True)), value_of)


def _sliced(call: relax.Call, source: np.ndarray) -> np.ndarray | None:
    """strided_slice with constant bounds."""
    bounds = [list(t.fields) for t in call.args[1:]]
    if any(not isinstance(v, tirx.IntImm) for part in bounds for v in part):
        return None
    axes, begin, end, *strides = ([int(v) for v in part] for part in bounds)
    steps = strides[0] if strides else [1] * len(axes)
    index: list[slice] = [slice(None)] * source.ndim
    for axis, first, last, step in zip(axes, begin, end, steps, strict=True):
        index[axis] = slice(first, last, step)
    return source[tuple(index)]
