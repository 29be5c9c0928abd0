"""Zeros over padding: what is dropped, and what only looks like it."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.passes.drop_mask import drop_mask
from turbo_tvm.passes.rewriter import is_call


def build(factor, name: str = "attention_mask", mask_first: bool = False) -> tvm.IRModule:
    """x * factor(emit, mask), for rows of 4 columns."""
    tokens = (tirx.Var("b", "int64"), tirx.Var("s", "int64"))
    x = relax.Var("x", relax.TensorType((*tokens, 4), "float32"))
    mask = relax.Var(name, relax.TensorType(tokens, "int64"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, mask], attrs={"num_input": 2}):
        with bb.dataflow():
            by = factor(bb.emit, mask)
            out = bb.emit_output(relax.op.multiply(*((by, x) if mask_first else (x, by))))
        bb.emit_func_output(out)
    return bb.finalize()


def as_floats(emit, mask):
    return emit(relax.op.astype(emit(relax.op.expand_dims(mask, [2])), "float32"))


def as_comparison(emit, mask):
    return emit(
        relax.op.astype(emit(relax.op.less(relax.const(0, "int64"), emit(relax.op.expand_dims(mask, [2])))), "float32")
    )


def halved(emit, mask):
    return emit(relax.op.multiply(as_floats(emit, mask), relax.const(0.5, "float32")))


def inverted(emit, mask):
    return emit(relax.op.subtract(relax.const(1.0, "float32"), as_floats(emit, mask)))


def products(mod: tvm.IRModule) -> int:
    return sum(is_call(b.value, "multiply") for block in mod["main"].body.blocks for b in block.bindings)


@pytest.mark.parametrize("factor", [as_floats, as_comparison])
@pytest.mark.parametrize("mask_first", [False, True])
def test_a_product_with_the_mask_is_dropped(factor, mask_first):
    after = drop_mask(build(factor, mask_first=mask_first), "main")
    assert not products(after) and after["main"].body.body.same_as(after["main"].params[0])


@pytest.mark.parametrize("factor", [halved, inverted])
def test_any_other_factor_is_left_alone(factor):
    before = build(factor)
    assert products(drop_mask(before, "main")) == products(before)


def test_without_a_mask_nothing_is():
    assert products(drop_mask(build(as_floats, name="token_type_ids"), "main")) == 1
