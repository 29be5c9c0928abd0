"""The inputs of a function, by name and kind."""

from __future__ import annotations

import pytest
from tvm import relax

from turbo_tvm.ops.inputs import (
    NUM_INPUT,
    InputKind,
    Inputs,
    batch_shape,
    input_params,
    num_input,
    weight_params,
    with_params,
)

TYPE = relax.TensorType((2, 3), "int64")


def function(*names: str, inputs: int | None) -> relax.Function:
    """A function that returns its first parameter."""
    params = [relax.Var(name, TYPE) for name in names]
    builder = relax.BlockBuilder()
    attrs = {} if inputs is None else {NUM_INPUT: inputs}
    with builder.function("main", params, attrs={"kept": 1, **attrs}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.add(params[0], params[0]))
        builder.emit_func_output(out)
    return builder.finalize()["main"]


def names(params: list[relax.Var]) -> list[str]:
    return [param.name for param in params]


@pytest.mark.parametrize("kind", InputKind)
def test_every_input_is_found_by_its_name(kind):
    func = function("other", kind.parameter, "weight", inputs=2)
    inputs = Inputs.of(func)
    assert getattr(inputs, kind.value).same_as(func.params[1])
    assert list(inputs.given()) == [kind]
    assert inputs.kind_of(func.params[1]) is kind
    assert all(getattr(inputs, other.value) is None for other in InputKind if other is not kind)


def test_a_weight_with_the_name_of_an_input_is_none():
    func = function("input_ids", "attention_mask", inputs=1)
    assert list(Inputs.of(func).given()) == [InputKind.TOKEN_IDS]
    assert Inputs.of(func).kind_of(func.params[1]) is None


def test_inputs_are_given_in_the_order_of_the_fields():
    func = function("cu_seqlens", "position_ids", "input_ids", inputs=3)
    assert list(Inputs.of(func).given()) == [
        InputKind.TOKEN_IDS,
        InputKind.POSITION_IDS,
        InputKind.CU_SEQLENS,
    ]


def test_another_expression_is_no_input():
    func = function("input_ids", "attention_mask", inputs=2)
    inputs = Inputs.of(func)
    twin = relax.Var("input_ids", TYPE)  # of the same name
    for expr in (twin, relax.op.add(*func.params), relax.const(0)):
        assert inputs.kind_of(expr) is None


@pytest.mark.parametrize(
    ("given", "images", "packed"),
    [
        (("input_ids", "attention_mask"), False, False),
        (("input_ids", "cu_seqlens", "query_tiles"), False, True),
        (("patches", "attention_mask"), True, False),
        (("patches", "cu_seqlens"), True, True),
        (("pixel_values",), False, False),
    ],
)
def test_what_sequences_are(given, images, packed):
    inputs = Inputs.of(function(*given, inputs=len(given)))
    assert (inputs.are_images, inputs.are_packed) == (images, packed)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_weights_follow_inputs(count):
    func = function("a", "b", "c", inputs=count)
    assert num_input(func) == count
    assert (names(input_params(func)), names(weight_params(func))) == (["a", "b", "c"][:count], ["a", "b", "c"][count:])


def test_a_function_that_does_not_say_has_no_inputs():
    func = function("input_ids", inputs=None)
    bare = relax.Function(func.params, func.body, func.ret_ty)
    for each in (func, bare):
        assert (num_input(each), input_params(each), names(weight_params(each))) == (0, [], ["input_ids"])
        assert Inputs.of(each) == Inputs()


def test_other_parameters_keep_body_and_attributes():
    func = function("input_ids", "weight", inputs=1)
    mask = relax.Var("attention_mask", TYPE)
    changed = with_params(func, [func.params[0], mask, func.params[1]], 2)
    assert names(input_params(changed)) == ["input_ids", "attention_mask"]
    assert names(weight_params(changed)) == ["weight"]
    assert changed.body.same_as(func.body) and int(changed.attrs["kept"]) == 1
    assert num_input(func) == 1  # which stays as it was


def test_the_batch_has_the_shape_of_the_first_input():
    ids = relax.Var("input_ids", TYPE)
    limits = relax.Var("cu_seqlens", relax.TensorType((5,), "int32"))
    changed = with_params(function("input_ids", inputs=1), [ids, limits], 2)
    assert batch_shape(changed) == [2, 3]
