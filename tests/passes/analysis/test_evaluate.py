"""Parts of the graph, cut out and run on sample inputs."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.passes.analysis.evaluate import concrete, cut, evaluate
from turbo_tvm.passes.rewriter import Rewriter


class Graph:
    """What a rewriter sees while it runs over a mask `(b, s)`, ids `(b, s)` and a weight `(64, 2)`."""

    def __init__(self):
        self.b, self.s = tirx.Var("b", "int64"), tirx.Var("s", "int64")
        self.mask = relax.Var("mask", relax.TensorType((self.b, self.s), "int64"))
        self.ids = relax.Var("ids", relax.TensorType((self.b, self.s), "int64"))
        self.weight = relax.Var("weight", relax.TensorType((64, 2), "float32"))
        self.params = [self.mask, self.ids, self.weight]
        func = relax.Function(self.params, self.mask, self.mask.ty)
        self.rewriter = Rewriter(tvm.IRModule({"main": func}), "main")
        self.emit = self.rewriter.emit
        self.dims = {self.b: 2, self.s: 3}

    def value_of(self, values: dict):
        return lambda param: values.get(param.name)


@pytest.fixture
def graph():
    g = Graph()
    with g.rewriter.builder.function("main", g.params):
        with g.rewriter.builder.dataflow():
            yield g
            out = g.rewriter.builder.emit_output(g.mask)
        g.rewriter.builder.emit_func_output(out)


MASK = np.array([[1, 1, 1], [1, 0, 0]], "int64")


def key_bias(g):
    wide = g.emit(relax.op.expand_dims(g.emit(relax.op.astype(g.mask, "float32")), [1, 2]))
    inverted = g.emit(relax.op.subtract(relax.const(1.0), wide))
    return g.emit(relax.op.multiply(inverted, relax.const(-1e9)))


def test_the_bias_of_a_mask(graph):
    value = evaluate(graph.rewriter, key_bias(graph), graph.dims, graph.value_of({"mask": MASK}))
    assert value.shape == (2, 1, 1, 3)
    np.testing.assert_array_equal(value[:, 0, 0], np.float32([[0, 0, 0], [0, -1e9, -1e9]]))


def distances(g):
    """j - i, `(s, s)`: of no parameter, and yet of the length."""
    i = g.emit(relax.op.arange(0, g.s, 1, "int64"))
    columns, rows = (g.emit(relax.op.expand_dims(i, [axis])) for axis in (0, 1))
    return g.emit(relax.op.subtract(columns, rows))


def test_the_bias_of_distances(graph):
    bucket = graph.emit(relax.op.add(distances(graph), relax.const(32, "int64")))
    table = graph.emit(relax.op.take(graph.weight, graph.emit(relax.op.reshape(bucket, (graph.s * graph.s,))), axis=0))
    bias = graph.emit(relax.op.reshape(table, (1, graph.s, graph.s, 2)))
    masked = graph.emit(relax.op.add(bias, key_bias(graph)))
    weight = np.arange(128, dtype="float32").reshape(64, 2)
    value_of = graph.value_of({"weight": weight, "mask": np.ones((2, 2), "int64")})
    value = evaluate(graph.rewriter, masked, {graph.b: 2, graph.s: 2}, value_of)
    np.testing.assert_array_equal(value[0], weight[[[32, 33], [31, 32]]])


def test_a_parameter_is_its_own_value(graph):
    value = evaluate(graph.rewriter, graph.mask, graph.dims, graph.value_of({"mask": MASK}))
    np.testing.assert_array_equal(value, MASK)


def test_a_constant_needs_no_parameters(graph):
    value = evaluate(graph.rewriter, relax.const([1.0, 2.0]), graph.dims, graph.value_of({}))
    np.testing.assert_array_equal(value, [1, 2])


def test_an_expression_that_is_not_bound_yet(graph):
    value = evaluate(graph.rewriter, relax.op.add(graph.mask, graph.mask), graph.dims, graph.value_of({"mask": MASK}))
    np.testing.assert_array_equal(value, 2 * MASK)


def test_none_if_a_parameter_has_no_value(graph):
    total = graph.emit(relax.op.add(graph.mask, graph.ids))
    assert evaluate(graph.rewriter, total, graph.dims, graph.value_of({"mask": MASK})) is None


def test_an_expression_of_dimensions_alone(graph):
    value = evaluate(graph.rewriter, distances(graph), graph.dims, graph.value_of({}))
    places = np.arange(graph.dims[graph.s])
    np.testing.assert_array_equal(value, places[None, :] - places[:, None])


def test_none_if_a_dimension_remains_free(graph):
    assert evaluate(graph.rewriter, distances(graph), {graph.b: 2}, graph.value_of({"mask": MASK})) is None


def test_dimensions_that_do_not_occur_are_ignored(graph):
    doubled = graph.emit(relax.op.add(graph.weight, graph.weight))
    other = tirx.Var("other", "int64")
    func = concrete(graph.rewriter, doubled, graph.dims | {other: 9})
    assert [int(d) for d in func.ret_ty.shape.values] == [64, 2]


def test_cut_gives_what_the_expression_needs_in_order(graph):
    unrelated = graph.emit(relax.op.negative(graph.ids))
    bias = key_bias(graph)
    params, bindings = cut(graph.rewriter, bias)
    assert [p.name for p in params] == ["mask"]
    assert [value.op.name.removeprefix("relax.") for _, value in bindings] == [
        "astype",
        "expand_dims",
        "subtract",
        "multiply",
    ]
    assert all(var is not unrelated for var, _ in bindings)


def test_cut_does_not_repeat_shared_parts(graph):
    once = graph.emit(relax.op.negative(graph.mask))
    twice = graph.emit(relax.op.multiply(once, once))
    assert len(cut(graph.rewriter, twice)[1]) == 2


def test_cut_reads_through_tuples(graph):
    halves = graph.emit(relax.op.split(graph.weight, 2, axis=1))
    both = graph.emit(relax.op.concat([halves[1], halves[0]], axis=1))
    weight = np.arange(128, dtype="float32").reshape(64, 2)
    value = evaluate(graph.rewriter, both, graph.dims, graph.value_of({"weight": weight}))
    np.testing.assert_array_equal(value, weight[:, ::-1])


def test_cut_of_a_deep_model_does_not_exhaust_the_stack(graph):
    x = graph.mask
    for _ in range(1500):
        x = graph.emit(relax.op.negative(x))
    assert len(cut(graph.rewriter, x)[1]) == 1500


def test_values_come_back_as_arrays(graph):
    value = evaluate(graph.rewriter, graph.mask, graph.dims, graph.value_of({"mask": MASK}))
    assert isinstance(value, np.ndarray) and not isinstance(value, tvm.runtime.Tensor)
