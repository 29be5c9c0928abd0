"""Pooling over tokens and L2 normalisation: every spelling of these, and nothing that only looks like them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.ops import L2Normalize, Pool
from turbo_tvm.ops.call import operators
from turbo_tvm.passes.fuse_pooling import fuse_pooling


def const(value) -> relax.Expr:
    return relax.const(value, "float32")


def build(body, mask_name: str = "attention_mask") -> tvm.IRModule:
    """`main(x (b, s, 8), mask (b, s), weight (8,))` that returns `body(emit, x, mask, weight)`."""
    batch, length = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    x = relax.Var("x", relax.TensorType((batch, length, 8), "float32"))
    mask = relax.Var(mask_name, relax.TensorType((batch, length), "int64"))
    weight = relax.Var("weight", relax.TensorType((8,), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, mask, weight], attrs={"num_input": 2}):
        with bb.dataflow():
            out = bb.emit_output(body(bb.emit, x, mask, weight))
        bb.emit_func_output(out)
    return bb.finalize()


def fused(body) -> list[Any]:
    """The operators that there are after the pass."""
    return list(operators(fuse_pooling(build(body), "main")["main"]))


def first(emit, x, index=0, axis=1):
    return emit(relax.op.take(x, relax.const(index, "int64"), axis=axis))


def mean(emit, x, weights, count, keepdims=False):
    total = emit(relax.op.sum(emit(relax.op.multiply(x, weights)), axis=[1], keepdims=keepdims))
    return emit(relax.op.divide(total, count))


def expanded(emit, mask):
    return emit(relax.op.astype(emit(relax.op.expand_dims(mask, [2])), "float32"))


def expanded_by_where(emit, mask):
    wide = emit(relax.op.expand_dims(emit(relax.op.astype(mask, "bool")), [2]))
    return emit(relax.op.where(wide, const(1.0), const(0.0)))


def clamped_count(emit, mask):
    return emit(relax.op.clip(emit(relax.op.sum(expanded(emit, mask), axis=[1])), 1e-9, float("inf")))


def plain_count(emit, mask):
    return emit(relax.op.astype(emit(relax.op.sum(mask, axis=[1], keepdims=True)), "float32"))


def test_first_token():
    (pool,) = fused(lambda emit, x, mask, weight: first(emit, x))
    assert (type(pool), pool.attributes()) == (Pool, {"mode": "first"})
    assert (pool.x.name, pool.mask.name, len(pool.tensors)) == ("x", "attention_mask", 2)


@pytest.mark.parametrize("index, axis", [(1, 1), (-1, 1), (0, 0), (0, 2)])
def test_other_tokens_and_axes_are_left_alone(index, axis):
    assert fused(lambda emit, x, mask, weight: first(emit, x, index, axis)) == []


def test_first_token_that_keeps_its_axis_is_left_alone():
    # (b, 1, 8): a pool would give (b, 8)
    assert fused(lambda emit, x, mask, weight: first(emit, x, [0])) == []


def test_first_of_something_that_is_not_tokens_is_left_alone():
    def body(emit, x, mask, weight):
        batch, length = x.ty.shape.values[:2]
        return first(emit, emit(relax.op.reshape(x, (batch, 2, length * 4))))

    assert fused(body) == []


@pytest.mark.parametrize("weights", [expanded, expanded_by_where])
@pytest.mark.parametrize("count", [clamped_count, plain_count])
@pytest.mark.parametrize("swap", [False, True])
def test_mean_under_the_mask_in_every_spelling(weights, count, swap):
    def body(emit, x, mask, weight):
        factors = [x, weights(emit, mask)]
        return mean(emit, *(reversed(factors) if swap else factors), count(emit, mask))

    (pool,) = fused(body)
    assert (type(pool), pool.x.name, pool.attributes()) == (Pool, "x", {"mode": "mean"})


def test_arithmetic_of_the_mask_disappears():
    mod = fuse_pooling(build(lambda emit, x, m, w: mean(emit, x, expanded(emit, m), clamped_count(emit, m))), "main")
    (block,) = mod["main"].body.blocks
    assert len(block.bindings) == 1


OTHER_COUNTS = {
    "square root of it": lambda emit, mask: emit(relax.op.sqrt(clamped_count(emit, mask))),
    "padded length": lambda emit, mask: emit(relax.op.sum(emit(relax.op.ones_like(plain_count(emit, mask))), axis=[1])),
    "clamped from above": lambda emit, mask: emit(relax.op.clip(plain_count(emit, mask), 0.0, 5.0)),
    "clamped to two": lambda emit, mask: emit(relax.op.clip(plain_count(emit, mask), 2.0, float("inf"))),
    "one more": lambda emit, mask: emit(relax.op.add(plain_count(emit, mask), const(1.0))),
    "constant": lambda emit, mask: const(7.0),
    "constant of rank two": lambda emit, mask: const([[7.0]]),
}


@pytest.mark.parametrize("count", OTHER_COUNTS)
def test_sum_divided_by_anything_else_is_left_alone(count):
    assert fused(lambda emit, x, m, w: mean(emit, x, expanded(emit, m), OTHER_COUNTS[count](emit, m))) == []


OTHER_WEIGHTS = {
    "inverted mask": lambda emit, mask: emit(relax.op.subtract(const(1.0), expanded(emit, mask))),
    "twice the mask": lambda emit, mask: emit(relax.op.multiply(expanded(emit, mask), const(2.0))),
    "mask times its count": lambda emit, mask: emit(
        relax.op.astype(
            emit(relax.op.expand_dims(emit(relax.op.multiply(mask, emit(relax.op.sum(mask, [1], True)))), [2])),
            "float32",
        )
    ),
    "constant": lambda emit, mask: const([[[1.0]]]),
}


@pytest.mark.parametrize("weights", OTHER_WEIGHTS)
def test_weighted_mean_is_left_alone(weights):
    assert fused(lambda emit, x, m, w: mean(emit, x, OTHER_WEIGHTS[weights](emit, m), clamped_count(emit, m))) == []


def test_mean_weighted_by_a_parameter_or_by_itself_is_left_alone():
    assert fused(lambda emit, x, m, w: mean(emit, x, w, clamped_count(emit, m))) == []
    assert fused(lambda emit, x, m, w: mean(emit, x, x, clamped_count(emit, m))) == []


def test_mean_that_keeps_its_axis_is_left_alone():
    def body(emit, x, mask, weight):
        count = emit(relax.op.expand_dims(clamped_count(emit, mask), [1]))
        return mean(emit, x, expanded(emit, mask), count, keepdims=True)

    assert fused(body) == []


def test_max_pooling_is_left_alone():
    def body(emit, x, mask, weight):
        return emit(relax.op.max(emit(relax.op.multiply(x, expanded(emit, mask))), axis=[1]))

    assert fused(body) == []


def test_without_a_mask_nothing_is_pooled():
    before = build(lambda emit, x, mask, weight: first(emit, x), mask_name="other")
    assert "turbo." not in fuse_pooling(before, "main").script()


def length_of(emit, x, *, axis=1, square="multiply", root="sqrt", keepdims=True):
    if square == "multiply":
        squared = emit(relax.op.multiply(x, x))
    else:
        squared = emit(relax.op.power(emit(relax.op.abs(x)) if square == "abs" else x, const(2.0)))
    total = emit(relax.op.sum(squared, axis=[axis], keepdims=keepdims))
    return emit(relax.op.sqrt(total) if root == "sqrt" else relax.op.power(total, const(0.5)))


def clip(emit, length, floor=1e-12, ceiling=float("inf")):
    return emit(relax.op.clip(length, floor, ceiling))


@pytest.mark.parametrize("square", ["multiply", "power", "abs"])
@pytest.mark.parametrize("root", ["sqrt", "power"])
@pytest.mark.parametrize("clamp", ["clip", "maximum"])
@pytest.mark.parametrize("broadcast", [False, True])
def test_l2_normalisation_in_every_spelling(square, root, clamp, broadcast):
    def body(emit, x, mask, weight):
        pooled = first(emit, x)
        length = length_of(emit, pooled, axis=-1, square=square, root=root)
        length = clip(emit, length) if clamp == "clip" else emit(relax.op.maximum(length, const(1e-12)))
        length = emit(relax.op.broadcast_to(length, pooled.ty.shape)) if broadcast else length
        return emit(relax.op.divide(pooled, length))

    found = fused(body)
    assert [type(f) for f in found] == [Pool, L2Normalize]
    assert found[1].eps == pytest.approx(1e-12)


def _another_row(emit, x):
    return clip(emit, length_of(emit, emit(relax.op.negative(x))))


OTHER_NORMS = {
    "not clamped": length_of,
    "clamped from above": lambda emit, x: clip(emit, length_of(emit, x), ceiling=5.0),
    "over the batch": lambda emit, x: clip(emit, length_of(emit, x, axis=0)),
    "of another tensor": _another_row,
    "no root": lambda emit, x: clip(emit, emit(relax.op.sum(emit(relax.op.multiply(x, x)), [1], True))),
    "cubes": lambda emit, x: clip(
        emit, emit(relax.op.sqrt(emit(relax.op.sum(emit(relax.op.power(x, const(3.0))), [1], True))))
    ),
}


@pytest.mark.parametrize("norm", OTHER_NORMS)
def test_other_normalisations_are_left_alone(norm):
    def body(emit, x, mask, weight):
        pooled = first(emit, x)
        return emit(relax.op.divide(pooled, OTHER_NORMS[norm](emit, pooled)))

    assert [type(f) for f in fused(body)] == [Pool]


def test_normalisation_over_the_tokens_is_left_alone():
    # One number per token: its second axis is the length of the sequence, not a vector's columns.
    def body(emit, x, mask, weight):
        scores = emit(relax.op.sum(x, axis=[2]))
        return emit(relax.op.divide(scores, clip(emit, length_of(emit, scores))))

    assert fused(body) == []


def test_large_upper_bound_is_none():
    largest = float(np.finfo("float32").max)

    def body(emit, x, mask, weight):
        pooled = first(emit, x)
        return emit(relax.op.divide(pooled, clip(emit, length_of(emit, pooled), ceiling=largest)))

    assert [type(f) for f in fused(body)] == [Pool, L2Normalize]


def at_token(rows, sequences=None):
    """`main(input_ids, attention_mask, x)`: x at `rows(emit, ids)` of every sequence."""
    batch, length = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    ids = relax.Var("input_ids", relax.TensorType((batch, length), "int64"))
    mask = relax.Var("attention_mask", relax.TensorType((batch, length), "int64"))
    x = relax.Var("x", relax.TensorType((batch, length, 8), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [ids, mask, x], attrs={"num_input": 3}):
        with bb.dataflow():
            counted = bb.emit(relax.op.arange(*(sequences or (0,)), batch, 1, dtype="int64"))
            out = bb.emit_output(relax.op.index_tensor(x, [counted, rows(bb.emit, ids)]))
        bb.emit_func_output(out)
    return [f.attributes() for f in operators(fuse_pooling(bb.finalize(), "main")["main"])]


def is_token(emit, ids, token=7):
    return emit(relax.op.equal(ids, relax.const(token, "int64")))


AT_TOKENS = {
    "the first of an id": (lambda emit, ids: _argmax(emit, emit(relax.op.astype(is_token(emit, ids), "int32"))), 7),
    "the same by where": (
        lambda emit, ids: _argmax(
            emit, emit(relax.op.where(is_token(emit, ids, 0), relax.const(3, "int32"), relax.const(1, "int32")))
        ),
        0,
    ),
    "the largest": (lambda emit, ids: _argmax(emit, emit(relax.op.astype(ids, "int32"))), -1),
}


def _argmax(emit, x):
    return emit(relax.op.argmax(x, axis=-1))


@pytest.mark.parametrize("name", AT_TOKENS)
def test_the_row_of_a_token(name):
    rows, token = AT_TOKENS[name]
    assert at_token(rows) == [{"mode": "first", "token": token}]


OTHER_ROWS = {
    "the smallest": lambda emit, ids: emit(relax.op.argmin(ids, axis=-1)),
    "the first of any other id": lambda emit, ids: emit(
        relax.op.argmin(emit(relax.op.astype(is_token(emit, ids), "int32")), axis=-1)
    ),
    "the last of an id": lambda emit, ids: emit(
        relax.op.subtract(
            emit(relax.op.sum(emit(relax.op.astype(is_token(emit, ids), "int64")), axis=[1])),
            relax.const(1, "int64"),
        )
    ),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_any_other_row_is_left_alone(name):
    assert at_token(OTHER_ROWS[name]) == []


def test_rows_of_other_sequences_are_left_alone():
    assert at_token(AT_TOKENS["the largest"][0], sequences=(1,)) == []


@pytest.mark.parametrize(("patches", "index", "attrs"), [(True, 0, {}), (True, 1, {"row": 1}), (False, 0, None)])
def test_any_row_of_images(patches, index, attrs):
    """All of them are as long; another fixed length is something else."""
    batch = tirx.Var("b", "int64")
    first_input = relax.Var("patches" if patches else "ids", relax.TensorType((batch, 5, 6), "float32"))
    mask = relax.Var("attention_mask", relax.TensorType((batch, 5), "int64"))
    x = relax.Var("x", relax.TensorType((batch, 5, 8), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [first_input, mask, x], attrs={"num_input": 2}):
        with bb.dataflow():
            out = bb.emit_output(relax.op.take(x, relax.const(index, "int64"), axis=1))
        bb.emit_func_output(out)
    found = [f.attributes() for f in operators(fuse_pooling(bb.finalize(), "main")["main"])]
    assert found == ([] if attrs is None else [{"mode": "first", **attrs}])
