"""Residual sums and LayerNorm: into the product where nothing else reads it, on their own otherwise."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Linear, Norm, Operator
from turbo_tvm.ops.call import match, operators, to_call
from turbo_tvm.passes.fuse_norm import fuse_norm

t = TypeVar("t")

PLAIN = '{"tensors": ["x", "weight", "bias"]}'
POST_NORM = '{"norm_eps": 1e-12, "tensors": ["x", "weight", "bias", "residual", "gamma", "beta"]}'
ROWS = (4, 8)


def test_residual_and_norm_go_into_the_product():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            w: R.Tensor((8, 8), "float32"),
            c: R.Tensor((8,), "float32"),
            gamma: R.Tensor((8,), "float32"),
            beta: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                total = R.add(y, x)
                out = R.nn.layer_norm(total, gamma, beta, axes=[-1], epsilon=1e-12)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            w: R.Tensor((8, 8), "float32"),
            c: R.Tensor((8,), "float32"),
            gamma: R.Tensor((8,), "float32"),
            beta: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.call_dps_packed(
                    "turbo.linear", (x, w, c, x, gamma, beta, R.str(POST_NORM)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(fuse_norm(Before, "main"), Expected)


class Graph:
    """Emits what the tests are made of."""

    def __init__(self):
        rows = relax.TensorType((tirx.Var("t", "int64"), *ROWS), "float32")
        self.x, self.r = relax.Var("x", rows), relax.Var("r", rows)
        self.w = relax.Var("w", relax.TensorType((8, 8), "float32"))
        self.vectors = [relax.Var(name, relax.TensorType((8,), "float32")) for name in ("c", "gamma", "beta")]
        self.builder = relax.BlockBuilder()
        self.emit = self.builder.emit

    def linear(self, x, activation=None):
        product = Linear(x=x, weight=self.w, bias=self.vectors[0], activation=activation, out=x.ty)
        return self.emit(to_call(product))

    def add(self, a, b):
        return self.emit(relax.op.add(a, b))

    def norm(self, x, **options):
        options = {"axes": [-1], "epsilon": 1e-5} | options
        return self.emit(relax.op.nn.layer_norm(x, *self.vectors[1:], **options))


def fuse(body) -> tuple[list[Any], list[str]]:
    """The operators of ours, and those of TVM's that are left after the pass."""
    g = Graph()
    with g.builder.function("main", [g.x, g.r, g.w, *g.vectors], attrs={"num_input": 2}):
        with g.builder.dataflow():
            out = g.builder.emit_output(body(g))
        g.builder.emit_func_output(out)
    values = [b.value for block in fuse_norm(g.builder.finalize(), "main")["main"].body.blocks for b in block.bindings]
    found = [match(v, Operator) for v in values]
    rest = [v.op.name for v, f in zip(values, found, strict=True) if f is None and isinstance(v, relax.Call)]
    return [f for f in found if f is not None], rest


def names(found: Operator) -> list[str]:
    return [t.name for t in found.tensors]


def test_residual_of_a_pre_norm_model_goes_into_the_product():
    (linear,), rest = fuse(lambda g: g.add(g.r, g.linear(g.x)))
    assert (names(linear), linear.residual.name, rest) == (["x", "w", "c", "r"], "r", [])


def test_norm_without_residual_goes_into_the_product():
    (linear,), rest = fuse(lambda g: g.norm(g.linear(g.x)))
    assert (linear.norm_eps, linear.residual, rest) == (1e-5, None, [])
    assert (linear.gamma.name, linear.beta.name) == ("gamma", "beta")


def kinds(found: list) -> list[tuple[type[Operator], bool]]:
    """What the operators are, and whether each takes a residual."""
    return [(type(f), f.residual is not None) for f in found]


def test_pre_norm_residual_with_several_readers_is_normalised_on_its_own():
    def body(g):
        total = g.add(g.linear(g.x), g.r)
        return g.add(g.linear(g.norm(total)), total)

    found, rest = fuse(body)
    assert kinds(found) == [(Linear, True), (Norm, False), (Linear, True)]
    assert rest == []


def test_norm_and_sum_without_a_product():
    (norm,), rest = fuse(lambda g: g.norm(g.add(g.x, g.r)))
    assert (type(norm), names(norm), norm.eps) == (Norm, ["x", "r", "gamma", "beta"], 1e-5)
    assert norm.residual.name == "r" and not norm.is_rms
    assert rest == []


def test_norm_alone():
    (norm,), rest = fuse(lambda g: g.norm(g.x))
    assert (names(norm), norm.residual, rest) == (["x", "gamma", "beta"], None, [])


def test_product_that_something_else_reads_is_not_fused():
    def body(g):
        product = g.linear(g.x)
        return g.emit(relax.op.multiply(g.norm(g.add(product, g.r)), product))

    found, _ = fuse(body)
    assert kinds(found) == [(Linear, False), (Norm, True)]


def test_sum_that_something_else_reads_keeps_its_operator():
    def body(g):
        total = g.add(g.x, g.r)
        return g.emit(relax.op.multiply(g.norm(total), total))

    (norm,), rest = fuse(body)
    assert (norm.residual, rest) == (None, ["relax.add", "relax.multiply"])


def test_product_takes_one_residual():
    (linear,), rest = fuse(lambda g: g.add(g.add(g.linear(g.x), g.r), g.x))
    assert (names(linear), linear.residual.name, rest) == (["x", "w", "c", "r"], "r", ["relax.add"])


def test_product_plus_itself_keeps_its_sum():
    def body(g):
        product = g.linear(g.x)
        return g.add(product, product)

    (linear,), rest = fuse(body)
    assert (linear.residual, rest) == (None, ["relax.add"])


def test_sum_with_a_vector_is_no_residual():
    (linear,), rest = fuse(lambda g: g.add(g.linear(g.x), g.vectors[0]))
    assert (linear.residual, rest) == (None, ["relax.add"])


def test_activation_before_the_residual_is_kept():
    (linear,), _ = fuse(lambda g: g.norm(g.add(g.linear(g.x, activation="gelu"), g.r)))
    assert linear.attributes() == {"activation": "gelu", "norm_eps": 1e-5}
    assert linear.residual.name == "r"


@pytest.mark.parametrize("options", [{"axes": [-2]}, {"axes": [-2, -1]}, {"center": False}, {"scale": False}])
def test_other_norms_are_left_alone(options):
    g = Graph()
    shape = ROWS if len(options.get("axes", [0])) == 2 else ROWS[:1] if options.get("axes") == [-2] else ROWS[1:]
    g.vectors[1:] = [relax.Var(name, relax.TensorType(shape, "float32")) for name in ("gamma", "beta")]
    with g.builder.function("main", [g.x, *g.vectors], attrs={"num_input": 1}):
        with g.builder.dataflow():
            out = g.builder.emit_output(g.norm(g.x, **options))
        g.builder.emit_func_output(out)
    before = g.builder.finalize()
    assert "turbo." not in fuse_norm(before, "main").script()


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, gamma, beta: relax.op.nn.layer_norm(x, gamma, beta, axes=[-1]),
        lambda x, gamma, beta: relax.op.nn.rms_norm(x, gamma, axes=[-1]),
    ],
    ids=["layer_norm", "rms_norm"],
)
def test_norm_of_weights_is_left_alone(norm):
    gamma, beta = (relax.Var(name, relax.TensorType((8,), "float32")) for name in ("gamma", "beta"))
    table = relax.Var("table", relax.TensorType(ROWS, "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [table, gamma, beta], attrs={"num_input": 0}):
        with bb.dataflow():
            out = bb.emit_output(norm(table, gamma, beta))
        bb.emit_func_output(out)
    before = bb.finalize()
    tvm.ir.assert_structural_equal(fuse_norm(before, "main"), before)


def rms_graph(spelling: str, *, power: float = 2.0, axis: int = -1, add: bool = False, read_sum: bool = False):
    """x / sqrt(mean(x^2) + eps) * gamma as `spelling` has it, of x or of a sum."""
    rows = relax.TensorType((tirx.Var("t", "int64"), *ROWS), "float32")
    x, other = relax.Var("x", rows), relax.Var("other", rows)
    gamma = relax.Var("gamma", relax.TensorType((8,), "float32"))
    bb, op = relax.BlockBuilder(), relax.op
    with bb.function("main", [x, other, gamma], attrs={"num_input": 2}):
        with bb.dataflow():
            source = bb.emit(op.add(x, other)) if add else x
            square = op.multiply(source, source)
            if spelling != "product":
                square = op.power(source, relax.const(power, "float32"))
            mean = bb.emit(op.mean(bb.emit(square), axis, keepdims=True))
            inner = bb.emit(op.add(mean, relax.const(1e-6, "float32")))
            if spelling == "quotient":  # as ONNX graphs have it
                scaled = op.divide(source, bb.emit(op.sqrt(inner)))
            elif spelling == "reciprocal":
                root = bb.emit(op.sqrt(inner))
                scaled = op.multiply(bb.emit(op.divide(relax.const(1.0, "float32"), root)), source)
            else:
                scaled = op.multiply(source, bb.emit(op.rsqrt(inner)))
            pair = (bb.emit(scaled), gamma) if spelling == "product" else (gamma, bb.emit(scaled))
            out = bb.emit(op.multiply(*pair))
            result = bb.emit_output(bb.emit(op.add(out, source)) if read_sum else out)
        bb.emit_func_output(result)
    return bb.finalize()


def norms_of(mod: tvm.IRModule) -> list[Norm]:
    return [f for f in operators(fuse_norm(mod, "main")["main"]) if isinstance(f, Norm)]


@pytest.mark.parametrize("spelling", ["rsqrt", "product", "quotient", "reciprocal"])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm_in_any_spelling(spelling, add):
    (norm,) = norms_of(rms_graph(spelling, add=add))
    assert norm.attributes() == {"eps": pytest.approx(1e-6)}
    assert norm.is_rms and (norm.residual is not None) == add
    assert names(norm) == ["x", *(["other"] if add else []), "gamma"]


def test_rms_norm_of_a_sum_that_is_read_elsewhere_leaves_the_sum():
    (norm,) = norms_of(rms_graph("rsqrt", add=True, read_sum=True))
    assert norm.residual is None and len(norm.tensors) == 2


@pytest.mark.parametrize("change", [{"power": 3.0}, {"axis": 1}])
def test_what_is_no_rms_norm_is_left_alone(change):
    assert norms_of(rms_graph("rsqrt", **change)) == []
