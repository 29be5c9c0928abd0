"""The base of the passes: rules, looking back, counting readers, and tidying up."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops.operand import dims
from turbo_tvm.passes.rewriter import Rewriter, is_call, scalar, shape_of, substitute, tidy

b = TypeVar("b")


@I.ir_module
class Chain:
    @R.function
    def main(x: R.Tensor((b, 8), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.exp(x)
            z = R.negative(y)
            w = R.tanh(z)
            v = R.add(w, y)
            R.output(v)
        return v


class Rules(Rewriter):
    """A rewriter with the rules it is given, which take the rewriter and the call."""

    def __init__(self, mod, *rules):
        super().__init__(mod, "main")
        self._rules = rules

    def rules(self):
        return [lambda call, rule=rule: rule(self, call) for rule in self._rules]


def operators(mod: tvm.IRModule) -> list[str]:
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    return [b.value.op.name.removeprefix("relax.") for b in bindings if isinstance(b.value, relax.Call)]


def test_without_rules_nothing_changes():
    tvm.ir.assert_structural_equal(Rules(Chain).run(), Chain)


def test_the_base_has_no_rules():
    with pytest.raises(NotImplementedError):
        Rewriter(Chain, "main").run()


def test_the_first_rule_that_answers_wins():
    def first(r, call):
        return relax.op.sqrt(call.args[0]) if is_call(call, "exp") else None

    def second(r, call):
        return relax.op.abs(call.args[0]) if is_call(call, "exp") or is_call(call, "tanh") else None

    assert operators(Rules(Chain, first, second).run()) == ["sqrt", "negative", "abs", "add"]


def test_a_rule_may_answer_with_a_variable_and_what_is_unused_disappears():
    def rule(r, call):
        inner = r.call_of(call.args[0], "negative") if is_call(call, "tanh") else None
        return inner.args[0] if inner is not None else None

    assert operators(Rules(Chain, rule).run()) == ["exp", "add"]


def test_a_rule_sees_what_earlier_rules_made():
    seen = []

    def rule(r, call):
        if is_call(call, "exp"):
            return relax.op.sqrt(r.emit(relax.op.abs(call.args[0])))
        if is_call(call, "negative"):
            seen.append((r.call_of(call.args[0], "sqrt") is not None, r.call_of(call.args[0], "exp") is None))
            seen.append(r.definition(r.definition(call.args[0]).args[0]).op.name)
        return None

    Rules(Chain, rule).run()
    assert seen == [(True, True), "relax.abs"]


def test_readers_are_counted_in_the_original_graph():
    counted = {}

    def rule(r, call):
        for arg in call.args:
            if isinstance(arg, relax.Var):
                counted[call.op.name.removeprefix("relax."), len(counted)] = r.used_once(arg)
        return relax.op.abs(call.args[0]) if is_call(call, "exp") else None

    Rules(Chain, rule).run()
    assert list(counted.values()) == [True, False, True, True, False]


def test_an_output_is_a_reader():
    @I.ir_module
    class Both:
        @R.function
        def main(x: R.Tensor((b, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.exp(x)
                z = R.negative(y)
                out = (y, z)
                R.output(out)
            return out

    once = []
    Rules(Both, lambda r, call: once.append(r.used_once(call.args[0]))).run()
    assert once == [True, False]


def test_expressions_other_than_variables_are_never_used_once():
    assert not Rules(Chain).used_once(relax.const(1.0))


def test_the_variable_of_the_binding_is_known_to_rules():
    names = []
    Rules(Chain, lambda r, call: names.append(r.current.name)).run()
    assert names == ["y", "z", "w", "v"]


def test_tuples_are_read_through():
    @I.ir_module
    class Tuples:
        @R.function
        def main(x: R.Tensor((b, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.exp(x)
                pair = (x, y)
                second = pair[1]
                out = R.negative(second)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.exp(x)
                out = R.negative(y)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(Rules(Tuples).run(), Expected)


def test_bindings_that_an_import_never_makes_are_an_error():
    x = relax.Var("x", relax.TensorType(dtype="float32", ndim=2))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(
                relax.op.exp(bb.match_cast(x, relax.TensorType((tirx.Var("n", "int64"), 8), "float32")))
            )
        bb.emit_func_output(out)
    with pytest.raises(ValueError, match="MatchCast is not expected"):
        Rules(bb.finalize()).run()


def test_other_functions_of_the_module_stay():
    mod = tvm.IRModule({"main": Chain["main"], "other": Chain["main"].with_attr("global_symbol", "other")})
    assert {v.name_hint for v in Rules(mod).run().get_global_vars()} == {"main", "other"}


def test_substitute_replaces_variables_at_every_place():
    x, y = (relax.Var(name, relax.TensorType((2,), "float32")) for name in "xy")
    new = {x: y}
    assert substitute(x, new).same_as(y)
    assert substitute(y, new).same_as(y)
    assert substitute(relax.op.add(x, x), new).args[1].same_as(y)
    assert substitute(relax.Tuple([x, y]), new).fields[0].same_as(y)
    pair = relax.Var("pair", relax.TupleType([x.ty, y.ty]))
    assert substitute(relax.TupleGetItem(pair, 0), {pair: relax.Tuple([x, y])}).same_as(x)
    assert substitute(relax.op.concat([x, y]), new).args[0].fields[0].same_as(y)
    constant = relax.const(1.0)
    assert substitute(constant, new).same_as(constant)


def test_dimensions():
    n = tirx.Var("n", "int64")
    assert dims(relax.TensorType((3, 4), "float32")) == [3, 4]
    symbolic = shape_of(relax.Var("x", relax.TensorType((n, 4), "float32")))
    assert symbolic[0].same_as(n) and symbolic[1] == 4
    assert dims(relax.TensorType(dtype="float32", ndim=2)) == []
    assert dims(relax.TupleType([])) == []


def test_scalars():
    assert scalar(relax.const(2.5)) == 2.5
    assert scalar(relax.const([[3]], "int64")) == 3.0
    assert scalar(relax.const([1.0, 2.0])) is None
    assert scalar(relax.Var("x", relax.TensorType((), "float32"))) is None


def test_tidy_removes_copies_and_what_nothing_reads():
    @I.ir_module
    class Untidy:
        @R.function
        def main(x: R.Tensor((b, 8), "float32")):
            with R.dataflow():
                unread = R.exp(x)  # noqa: F841
                copy = x
                out = R.negative(copy)
                R.output(out)
            return out

    assert operators(tidy(Untidy)) == ["negative"]
