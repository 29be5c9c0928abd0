"""Ids and masks that a graph looks up itself become inputs; those of no known rule are left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import ir, relax, tirx

from turbo_tvm.passes.extract_inputs import Positions, extract_inputs
from turbo_tvm.passes.rewriter import is_call

op = relax.op


class Graph:
    """A function of input_ids, attention_mask and a table (16, 4), under construction."""

    def __init__(self):
        self.b, self.s = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
        tokens = relax.TensorType((self.b, self.s), "int64")
        self.ids, self.mask = relax.Var("input_ids", tokens), relax.Var("attention_mask", tokens)
        self.table = relax.Var("table", relax.TensorType((16, 4), "float32"))
        self.builder = relax.BlockBuilder()
        self.emit = self.builder.emit

    def module(self, body: Callable[[], relax.Expr]) -> ir.IRModule:
        with self.builder.function("main", [self.ids, self.mask, self.table], attrs={"num_input": 2}):
            with self.builder.dataflow():
                out = self.builder.emit_output(body())
            self.builder.emit_func_output(out)
        return self.builder.finalize()

    def arange(self, stop=None) -> relax.Expr:
        return self.emit(op.arange(0, self.s if stop is None else stop, 1, "int64"))

    def number(self, value: int) -> relax.Expr:
        return relax.const(value, "int64")


@pytest.fixture
def graph():
    return Graph()


def inputs(mod: ir.IRModule) -> list[str]:
    return [p.name for p in mod["main"].params[: int(mod["main"].attrs["num_input"])]]


def calls(mod: ir.IRModule, name: str) -> list[relax.Call]:
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    return [value for value in values if is_call(value, name)]


@pytest.mark.parametrize("offset", [0, 2])
def test_counted_positions(graph, offset):
    def body():
        row = graph.emit(op.add(graph.arange(), graph.number(offset)))
        return op.take(graph.table, graph.emit(op.expand_dims(row, 0)), axis=0)

    mod, positions = extract_inputs(graph.module(body), "main")
    assert positions == Positions("arange", offset, None, 16)
    assert positions.longest == 16 - offset
    assert inputs(mod) == ["input_ids", "attention_mask", "position_ids"]
    (look_up,) = calls(mod, "take")
    assert look_up.args[1].name == "position_ids"


def test_a_constant_that_is_cut_to_the_length(graph):
    def body():
        every = relax.const(np.arange(16)[None], "int64")
        ids = graph.emit(op.strided_slice(every, [1], [0], [graph.s], assume_inbound=True))
        return op.take(graph.table, ids, axis=0)

    assert extract_inputs(graph.module(body), "main")[1] == Positions("arange", 0, None, 16)


def test_a_table_that_is_cut_to_the_length(graph):
    def body():
        rows = graph.emit(op.strided_slice(graph.table, [0], [3], [graph.s + 3], assume_inbound=True))
        return op.add(rows, graph.emit(op.astype(graph.emit(op.expand_dims(graph.ids, 2)), "float32")))

    mod, positions = extract_inputs(graph.module(body), "main")
    assert positions == Positions("arange", 3, None, 16)
    assert calls(mod, "take")[0].args[1].name == "position_ids"


@pytest.mark.parametrize("pad", [0, 1, 7])
def test_positions_that_count_what_is_no_padding(graph, pad):
    def body():
        real = graph.emit(op.astype(graph.emit(op.not_equal(graph.ids, graph.number(pad))), "int64"))
        counted = graph.emit(op.multiply(graph.emit(op.cumsum(real, 1)), real))
        return op.take(graph.table, graph.emit(op.add(counted, graph.number(pad))), axis=0)

    mod, positions = extract_inputs(graph.module(body), "main")
    assert positions == Positions("count_non_pad", pad, pad, 16)
    assert positions.longest == 15 - pad
    assert not calls(mod, "cumsum")


def test_rows_of_a_table_that_are_more_than_a_term_are_left_alone(graph):
    def body():
        rows = graph.emit(op.strided_slice(graph.table, [0], [0], [graph.s], assume_inbound=True))
        return op.expand_dims(rows, 0)

    assert extract_inputs(graph.module(body), "main")[1] is None


@pytest.mark.parametrize("rule", ["clipped", "again"])
def test_positions_that_are_counted_at_first_only_are_left_alone(graph, rule):
    def body():
        row = graph.emit(op.expand_dims(graph.arange(), 0))
        ids = op.minimum(row, graph.number(9)) if rule == "clipped" else op.mod(row, graph.number(10))
        return op.take(graph.table, graph.emit(ids), axis=0)

    mod, positions = extract_inputs(graph.module(body), "main")
    assert positions is None
    assert inputs(mod) == ["input_ids", "attention_mask"]


def test_token_types_that_follow_from_separators_are_left_alone(graph):
    """0 before a separator, 1 behind it, 0 at padding: no constant, though most texts have no such ids."""

    def body():
        separators = graph.emit(op.astype(graph.emit(op.equal(graph.ids, graph.number(102))), "int64"))
        real = graph.emit(op.astype(graph.emit(op.not_equal(graph.ids, graph.number(0))), "int64"))
        return op.take(graph.table, graph.emit(op.multiply(graph.emit(op.cumsum(separators, 1)), real)), axis=0)

    assert inputs(extract_inputs(graph.module(body), "main")[0]) == ["input_ids", "attention_mask"]


def test_token_types_that_are_always_0(graph):
    def body():
        return op.take(graph.table, graph.emit(op.zeros((graph.b, graph.s), "int64")), axis=0)

    mod, positions = extract_inputs(graph.module(body), "main")
    assert positions is None
    assert inputs(mod) == ["input_ids", "attention_mask", "token_type_ids"]


def test_what_is_an_input_already_stays(graph):
    before = graph.module(lambda: op.take(graph.table, graph.ids, axis=0, mode="clip"))
    mod, positions = extract_inputs(before, "main")
    assert positions is None
    ir.assert_structural_equal(mod, before)


@pytest.mark.parametrize("rule", ["reversed", "doubled", "of the ids", "of the mask"])
def test_other_ids_are_left_alone(graph, rule):
    def body():
        row = graph.emit(op.expand_dims(graph.arange(), 0))
        ids = {
            "reversed": lambda: op.subtract(graph.number(15), row),
            "doubled": lambda: op.multiply(row, graph.number(2)),
            "of the ids": lambda: op.add(graph.ids, graph.number(1)),
            "of the mask": lambda: op.cumsum(graph.mask, 1),
        }[rule]()
        return op.take(graph.table, graph.emit(ids), axis=0)

    before = graph.module(body)
    mod, positions = extract_inputs(before, "main")
    assert positions is None
    assert inputs(mod) == ["input_ids", "attention_mask"]


def test_two_rules_in_one_graph_leave_the_second_alone(graph):
    def body():
        row = graph.emit(op.expand_dims(graph.arange(), 0))
        first = graph.emit(op.take(graph.table, row, axis=0))
        second = graph.emit(op.take(graph.table, graph.emit(op.add(row, graph.number(1))), axis=0))
        return op.add(first, second)

    mod, positions = extract_inputs(graph.module(body), "main")
    assert positions == Positions("arange", 0, None, 16)
    assert [call.args[1].name == "position_ids" for call in calls(mod, "take")] == [True, False]


def look_up(graph: Graph, shift: int = 0) -> relax.Expr:
    """The mask at (i, j + shift) for every sequence i and key j."""
    rows = graph.emit(op.reshape(graph.arange(graph.b), (graph.b, 1, 1, 1, 1)))
    keys = graph.emit(op.add(graph.emit(op.reshape(graph.arange(), (1, 1, 1, graph.s, 1))), graph.number(shift)))
    shape = (graph.b, 1, 1, graph.s, 1)
    pairs = [graph.emit(op.broadcast_to(x, shape)) for x in (rows, keys)]
    return op.gather_nd(graph.mask, graph.emit(op.concat(pairs, axis=-1)))


def test_a_look_up_of_the_whole_mask_is_the_mask(graph):
    mod, _ = extract_inputs(graph.module(lambda: look_up(graph)), "main")
    assert not calls(mod, "gather_nd")
    (shaped,) = calls(mod, "reshape")
    assert shaped.args[0].name == "attention_mask"


def test_a_look_up_of_a_flattened_mask_is_the_mask(graph):
    def body():
        flat = graph.emit(op.reshape(graph.mask, (graph.b * graph.s, 1)))
        rows = graph.emit(op.reshape(graph.arange(graph.b), (graph.b, 1, 1, 1)))
        length = graph.emit(op.shape_to_tensor(relax.ShapeExpr([graph.s])))
        first = graph.emit(op.multiply(rows, length))
        keys = graph.emit(op.reshape(graph.arange(), (1, 1, 1, graph.s)))
        return op.take(flat, graph.emit(op.add(first, keys)), axis=0)

    mod, _ = extract_inputs(graph.module(body), "main")
    assert not calls(mod, "take")
    assert calls(mod, "reshape")[-1].args[1].values[0].same_as(graph.b)


def test_another_look_up_of_the_mask_is_left_alone(graph):
    mod, _ = extract_inputs(graph.module(lambda: look_up(graph, shift=-1)), "main")
    assert calls(mod, "gather_nd")
