"""Operators are ordinary Relax calls: built, recognised, printed, parsed and compared like any other."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
import tvm_ffi
from sample_operators import SAMPLES, in_graph, module_with
from tvm import ir, relax
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import VOCABULARY, Attention, Embedding, L2Normalize, Linear, Norm, Operator
from turbo_tvm.ops.call import kinds, match, operators, to_call

b = TypeVar("b")

TYPE = relax.TensorType((4, 8), "float32")

every_operator = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.kernel_name())


def rows(name: str) -> relax.Var:
    return relax.Var(name, TYPE)


def norm(eps: float) -> Norm:
    return Norm(x=rows("x"), gamma=rows("gamma"), eps=eps, out=TYPE)


def text_of(call: relax.Call) -> str:
    return call.args[1].fields[-1].value


def test_there_is_a_sample_of_every_operator():
    assert {type(sample) for sample in SAMPLES} == set(VOCABULARY)


def test_names_are_told_apart():
    assert kinds() == {kind.NAME: kind for kind in VOCABULARY} and len(kinds()) == len(VOCABULARY)


@every_operator
def test_match_gives_back_what_was_made(sample):
    made = in_graph(sample)
    found = match(to_call(made), type(sample))
    assert type(found) is type(sample)
    assert found.attributes() == made.attributes()
    assert [(a.name, a.role, a.of) for a in found.arguments()] == [(a.name, a.role, a.of) for a in made.arguments()]
    assert all(mine.same_as(other) for mine, other in zip(found.tensors, made.tensors, strict=True))
    ir.assert_structural_equal(found.out, made.out)
    assert found.without_graph() == sample.without_graph()


@every_operator
def test_attributes_come_back_as_they_were(sample):
    """Not as lists where they were tuples: records are hashed."""
    found = match(to_call(in_graph(sample)), Operator)
    assert hash(found.without_graph()) == hash(sample.without_graph())


@every_operator
def test_a_printed_operator_is_parsed_again(sample):
    mod = module_with(in_graph(sample))
    again = tvm.script.from_source(mod.script())
    ir.assert_structural_equal(again, mod)
    assert [found.without_graph() for found in operators(again["main"])] == [sample.without_graph()]


def test_one_variable_may_be_several_tensors():
    x, heads = rows("x"), {"heads": 2, "head_dim": 4, "scale": 0.5, "max_length": 16, "first_columns": (0, 0, 0)}
    found = match(to_call(Attention(q=x, k=x, v=x, out=TYPE, **heads)), Attention)
    assert all(t.same_as(x) for t in (found.q, found.k, found.v)) and found.mask is None


def test_several_tensors_of_one_name_keep_their_order():
    ids, tables = tuple(map(rows, "ab")), tuple(map(rows, "cd"))
    found = match(to_call(Embedding(ids=ids, tables=tables, out=TYPE)), Embedding)
    assert ([t.name for t in found.ids], [t.name for t in found.tables]) == (["a", "b"], ["c", "d"])


@every_operator
def test_a_kernel_sees_shapes_and_types_of_the_graph(sample):
    """But the number of rows of tables, and which token is pooled, which kernels do not depend on."""
    seen = in_graph(sample).without_graph()
    assert seen == sample.without_graph()
    for mine, (name, _, operand, _) in zip(seen.tensors, sample.arguments(), strict=True):
        known = (None, *operand.shape[1:]) if name == "tables" else operand.shape
        assert (mine.shape, mine.dtype) == (known, operand.dtype)
    told = {name: value for name, value in sample.attributes().items() if name != "token"}
    assert (seen.out, seen.attributes()) == (sample.out, told)


def test_match_by_kind():
    call = to_call(norm(1e-5))
    assert match(call, Norm) is not None
    assert type(match(call, Operator)) is Norm
    assert match(call, Linear) is None


def test_anything_else_is_no_operator():
    x = rows("x")
    text = ir.StringImm('{"eps": 1e-05, "tensors": ["x"]}')
    names = ("other.normalize", "normalize", "turbo.other", "turbo.turbo.normalize")
    foreign = [relax.op.call_dps_packed(name, [x, text], out_ty=TYPE) for name in names]
    for expr in (None, x, relax.op.nn.relu(x), relax.Tuple([x]), *foreign):
        assert match(expr, Operator) is None


def test_attributes_are_spelt_in_one_order():
    x, gamma = rows("x"), rows("gamma")
    left = to_call(Linear(x=x, weight=x, bias=gamma, activation="gelu", norm_eps=1e-5, out=TYPE))
    right = to_call(Linear(norm_eps=1e-5, activation="gelu", bias=gamma, weight=x, x=x, out=TYPE))
    ir.assert_structural_equal(left, right)
    assert text_of(left) == '{"activation": "gelu", "norm_eps": 1e-05, "tensors": ["x", "weight", "bias"]}'


def test_attributes_that_are_as_by_default_are_not_spelt():
    x = rows("x")
    linear = Linear(x=x, weight=x, bias=x, activation=None, norm_eps=None, columns=None, out=TYPE)
    assert text_of(to_call(linear)) == '{"tensors": ["x", "weight", "bias"]}'


def test_other_attributes_are_another_operator():
    left, right = (to_call(norm(eps)) for eps in (1e-5, 1e-6))
    assert not tvm_ffi.structural_equal(left, right, map_free_vars=True)
    assert tvm_ffi.structural_equal(left, to_call(norm(1e-5)), map_free_vars=True)


def test_the_same_tensors_under_other_names_are_another_operator():
    x, v = rows("x"), rows("v")
    left = to_call(Norm(x=x, residual=x, gamma=v, eps=1e-5, out=TYPE))
    right = to_call(Norm(x=x, gamma=x, beta=v, eps=1e-5, out=TYPE))
    assert not tvm_ffi.structural_equal(left, right)


def test_printed_operators_are_parsed_again():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((b, 8), "float32")):
            with R.dataflow():
                out = R.call_dps_packed(
                    "turbo.normalize",
                    (x, R.str('{"eps": 1e-12, "tensors": ["x"]}')),
                    out_ty=R.Tensor((b, 8), "float32"),
                )
                R.output(out)
            return out

    again = tvm.script.from_source(Module.script())
    ir.assert_structural_equal(again, Module)
    found = match(again["main"].body.blocks[0].bindings[0].value, L2Normalize)
    assert found is not None and found.eps == 1e-12 and found.x.same_as(again["main"].params[0])


def test_operators_of_a_function_in_order():
    x = rows("x")
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            first = builder.emit(to_call(L2Normalize(x=x, eps=1e-12, out=TYPE)))
            active = builder.emit(relax.op.nn.relu(first))
            out = builder.emit_output(to_call(Norm(x=active, gamma=x, eps=1e-5, out=TYPE)))
        builder.emit_func_output(out)
    assert [type(found) for found in operators(builder.finalize()["main"])] == [L2Normalize, Norm]
