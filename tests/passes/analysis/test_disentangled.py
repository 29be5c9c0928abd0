"""Disentangled attention: what is recognised however it is spelt, and what must be left alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.ops import Attention
from turbo_tvm.ops.call import match
from turbo_tvm.passes.analysis.evaluate import evaluate
from turbo_tvm.passes.canonicalize import canonicalize
from turbo_tvm.passes.fuse_attention import fuse_attention
from turbo_tvm.passes.rewriter import Rewriter, shape_of

HEADS, HEAD_DIM, SPAN, LONGEST = 2, 4, 8, 20
WIDTH = HEADS * HEAD_DIM


@dataclass(frozen=True)
class Spelling:
    """A graph of DeBERTa's attention; the defaults are the formula.

    flat: heads and batch in one dimension, as DeBERTa v2 has them. keys, queries: which terms there are. factor: of the
    queries' term. turned: whether that is transposed. absolute: buckets by key and not by distance. window: what is
    farther apart is masked.
    """

    flat: bool = False
    keys: bool = True
    queries: bool = True
    factor: float = 1.0
    turned: bool = True
    absolute: bool = False
    window: int = LONGEST


class Graph:
    """Builds `main(x, attention_mask, to_q, to_k, relative, A, B)` in a spelling."""

    def __init__(self, spelling: Spelling):
        self.spelling = spelling
        self.bb = relax.BlockBuilder()
        self.emit = self.bb.emit
        self.b, self.s = tirx.Var("b", "int64"), tirx.Var("s", "int64")

    def build(self) -> tvm.IRModule:
        x, *weights = (
            relax.Var(name, relax.TensorType(shape, "float32"))
            for name, shape in {
                "x": (self.b, self.s, WIDTH),
                **{name: (WIDTH, WIDTH) for name in ("to_q", "to_k", "A", "B")},
                "relative": (2 * SPAN, WIDTH),
            }.items()
        )
        mask = relax.Var("attention_mask", relax.TensorType((self.b, self.s), "int64"))
        with self.bb.function("main", [x, mask, *weights], attrs={"num_input": 2}):
            with self.bb.dataflow():
                out = self.bb.emit_output(self.attention(x, mask, *weights))
            self.bb.emit_func_output(out)
        return canonicalize(self.bb.finalize(), "main")

    def attention(self, x, mask, to_q, to_k, a, b, relative) -> relax.Expr:
        e, o, how = self.emit, relax.op, self.spelling
        q, k = (e(o.matmul(x, weight)) for weight in (to_q, to_k))
        q_heads, k_heads, v_heads = (self.heads(rows, self.b, self.s) for rows in (q, k, x))
        scores = e(o.matmul(q_heads, e(self.swapped(k_heads))))
        if how.keys:
            scores = e(o.add(scores, self.term(q_heads, relative, a, 1)))
        if how.queries:
            term = self.term(k_heads, relative, b, -1)
            term = e(self.swapped(term)) if how.turned else term
            scores = e(o.add(scores, e(o.multiply(term, relax.const(how.factor, "float32")))))
        scores = e(o.divide(scores, relax.const(3.0, "float32")))
        scores = e(o.reshape(scores, (self.b, HEADS, self.s, self.s)))
        keep = e(o.astype(e(o.expand_dims(mask, [1, 2])), "bool"))
        near = e(o.less(e(o.abs(self.distance())), relax.const(how.window, "int64")))
        keep = e(o.logical_and(keep, e(o.expand_dims(near, [0, 1]))))
        weights = e(o.nn.softmax(e(o.where(keep, scores, relax.const(-3e38, "float32"))), axis=-1))
        if how.flat:
            weights = e(o.reshape(weights, (self.b * HEADS, self.s, self.s)))
        out = e(o.reshape(e(o.matmul(weights, v_heads)), (self.b, HEADS, self.s, HEAD_DIM)))
        return o.reshape(e(o.permute_dims(out, [0, 2, 1, 3])), (self.b, self.s, WIDTH))

    def heads(self, rows, batch, length) -> relax.Expr:
        split = self.emit(relax.op.reshape(rows, (batch, length, HEADS, HEAD_DIM)))
        heads = self.emit(relax.op.permute_dims(split, [0, 2, 1, 3]))
        return self.emit(relax.op.reshape(heads, (batch * HEADS, length, HEAD_DIM))) if self.spelling.flat else heads

    def swapped(self, x) -> relax.Expr:
        rank = len(shape_of(x))
        return relax.op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2])

    def distance(self) -> relax.Expr:
        i = self.emit(relax.op.arange(0, self.s, 1, "int64"))
        column = self.emit(relax.op.expand_dims(i, [1]))
        row = self.emit(relax.op.expand_dims(i, [0]))
        return self.emit(relax.op.subtract(column, row))

    def term(self, heads, relative, weight, sign: int) -> relax.Expr:
        """Rows of heads times the weights of every bucket, and of those the one of each pair."""
        e, o = self.emit, relax.op
        by_bucket = self.heads(e(o.expand_dims(e(o.matmul(relative, weight)), [0])), 1, 2 * SPAN)
        if self.spelling.flat:  # as torch repeats them
            wide = e(o.broadcast_to(e(o.expand_dims(by_bucket, [0])), (self.b, HEADS, 2 * SPAN, HEAD_DIM)))
            by_bucket = e(o.reshape(wide, (self.b * HEADS, 2 * SPAN, HEAD_DIM)))
        products = e(o.matmul(heads, e(self.swapped(by_bucket))))
        distance = self.distance()
        if self.spelling.absolute:
            index = e(o.expand_dims(e(o.arange(0, self.s, 1, "int64")), [0]))
            distance = e(o.add(e(o.multiply(distance, relax.const(0, "int64"))), index))
        signed = e(o.multiply(distance, relax.const(sign, "int64")))
        bucket = e(o.clip(e(o.add(signed, relax.const(SPAN, "int64"))), 0, 2 * SPAN - 1))
        lead = (self.b * HEADS,) if self.spelling.flat else (self.b, HEADS)
        wide = e(o.broadcast_to(bucket, (*lead, self.s, self.s)))
        return e(o.gather_elements(products, wide, axis=-1))


class Fused(Rewriter):
    """The graph after the pass, to look at."""

    def __init__(self, spelling: Spelling):
        super().__init__(fuse_attention(Graph(spelling).build(), "main", max_length=LONGEST), "main")
        self.run()

    def rules(self):
        return ()

    @property
    def attention(self) -> Attention | None:
        found = (match(value, Attention) for value in self.bound.values())
        return next((attention for attention in found if attention is not None), None)


def test_the_formula_is_fused_and_its_tables_are_over_distances():
    graph = Fused(Spelling(flat=True))
    attention = graph.attention
    assert attention.scale == pytest.approx(1 / 3)
    assert (attention.heads, attention.head_dim) == (HEADS, HEAD_DIM)
    names = [argument.name for argument in attention.arguments()]
    assert names == ["q", "k", "v", "mask", "key_table", "query_table"]
    rng = np.random.default_rng(0)
    values = {p.name: rng.standard_normal(shape_of(p), "float32") for p in graph.func.params[2:]}
    buckets = np.clip(np.arange(1 - LONGEST, LONGEST) + SPAN, 0, 2 * SPAN - 1)
    for name, table in zip("AB", (attention.key_table, attention.query_table), strict=True):
        wanted = (values["relative"] @ values[name])[buckets].T.reshape(HEADS, HEAD_DIM, -1)
        got = evaluate(graph, table, {}, lambda p: values[p.name])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spelling",
    [Spelling(factor=0.5), Spelling(turned=False, keys=False), Spelling(absolute=True), Spelling(window=LONGEST - 2)],
    ids=str,
)
def test_any_other_formula_is_left_alone(spelling):
    assert Fused(spelling).attention is None
