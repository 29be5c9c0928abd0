"""Cosines and sines of counted positions become look-ups; anything else is left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import ir, relax, tirx

from turbo_tvm.passes.rewriter import is_call
from turbo_tvm.passes.tabulate_positions import tabulate_positions

op = relax.op
FREQUENCIES = np.array([1.0, 0.1, 0.01], "float32")


class Graph:
    """A function of input_ids and three frequencies, under construction."""

    def __init__(self):
        self.b, self.s = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
        self.ids = relax.Var("input_ids", relax.TensorType((self.b, self.s), "int64"))
        self.frequencies = relax.Var("frequencies", relax.TensorType((3,), "float32"))
        self.builder = relax.BlockBuilder()
        self.emit = self.builder.emit

    def module(self, body: Callable[[], relax.Expr]) -> ir.IRModule:
        with self.builder.function("main", [self.ids, self.frequencies], attrs={"num_input": 1}):
            with self.builder.dataflow():
                out = self.builder.emit_output(body())
            self.builder.emit_func_output(out)
        return self.builder.finalize()

    def angles(self, rank: int = 3) -> relax.Expr:
        """(1, ..., length, 3): position times frequency."""
        row = self.emit(op.astype(self.emit(op.arange(0, self.s, 1, "int64")), "float32"))
        column = self.emit(op.reshape(row, (*[1] * (rank - 2), self.s, 1)))
        return self.emit(op.multiply(column, self.frequencies))


@pytest.fixture
def graph():
    return Graph()


def run(mod: ir.IRModule, *arguments: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return machine["main"](*[tvm.runtime.tensor(a) for a in arguments]).numpy()


@pytest.mark.parametrize(("turn", "by_hand"), [(op.cos, np.cos), (op.sin, np.sin)], ids=["cos", "sin"])
@pytest.mark.parametrize("rank", [3, 4])
def test_rows_are_looked_up_by_position(graph, turn, by_hand, rank):
    def body():
        per_token = graph.emit(op.astype(graph.ids, "float32"))
        shape = (graph.b, *[1] * (rank - 3), graph.s, 1)
        return op.add(graph.emit(turn(graph.angles(rank))), graph.emit(op.reshape(per_token, shape)))

    mod = tabulate_positions(graph.module(body), "main", 20)
    main = mod["main"]
    assert [p.name for p in main.params] == ["input_ids", "position_ids", "frequencies"]
    assert int(main.attrs["num_input"]) == 2
    ids, places = np.zeros((2, 4), "int64"), np.array([[0, 1, 2, 3], [7, 19, 0, 5]])
    wanted = by_hand(places[..., None] * FREQUENCIES)
    np.testing.assert_allclose(run(mod, ids, places, FREQUENCIES).reshape(wanted.shape), wanted, atol=1e-5)


def test_a_row_that_depends_on_the_length_is_left_alone(graph):
    def body():
        backwards = graph.emit(op.flip(graph.angles(), 1))
        return op.cos(backwards)

    before = graph.module(body)
    ir.assert_structural_equal(tabulate_positions(before, "main", 20), before)


def test_what_depends_on_an_input_is_left_alone(graph):
    def body():
        tokens = graph.emit(op.expand_dims(graph.emit(op.astype(graph.ids, "float32")), 2))
        return op.cos(graph.emit(op.multiply(tokens, graph.frequencies)))

    before = graph.module(body)
    mod = tabulate_positions(before, "main", 20)
    ir.assert_structural_equal(mod, before)
    assert is_call(mod["main"].body.blocks[0].bindings[-1].value, "cos")
