"""Attention in both spellings, with masks and biases of many kinds: what is fused, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from operators import Emit, module_of, operators_of, values_of
from tvm import relax, tirx

from turbo_tvm.ops import Attention
from turbo_tvm.ops.operand import dims
from turbo_tvm.passes.analysis.evaluate import evaluate
from turbo_tvm.passes.analysis.measure_bias import sample_positions
from turbo_tvm.passes.canonicalize import canonicalize
from turbo_tvm.passes.fuse_attention import _rounded, fuse_attention
from turbo_tvm.passes.rewriter import Rewriter

HEADS, HEAD_DIM = 2, 4
WINDOW = 50


def build(bias: Callable, *, eager: bool, scale: float = 0.5) -> tvm.IRModule:
    """One attention whose bias is `bias(emit, mask, weight, (b, s))`."""
    b, s = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    width = HEADS * HEAD_DIM
    x = relax.Var("x", relax.TensorType((b, s, width), "float32"))
    ids = relax.Var("input_ids", relax.TensorType((b, s), "int64"))
    mask = relax.Var("attention_mask", relax.TensorType((b, s), "int64"))
    weight = relax.Var("weight", relax.TensorType((64, HEADS), "float32"))

    def body(emit, x, ids, mask, weight):
        heads = [emit(relax.op.reshape(x, (b, s, HEADS, HEAD_DIM))) for _ in range(3)]
        added = bias(emit, mask, weight, (b, s), ids)
        attend = _eager if eager else _sdpa
        return relax.op.reshape(attend(emit, heads, added, scale), (b, s, width))

    return canonicalize(module_of([x, ids, mask, weight], body, inputs=3), "main")


def _sdpa(emit: Emit, heads: list[relax.Var], bias: relax.Expr, scale: float) -> relax.Expr:
    return emit(relax.op.nn.attention(*heads, bias, scale=tirx.FloatImm("float32", scale)))


def _eager(emit: Emit, heads: list[relax.Var], bias: relax.Expr, scale: float) -> relax.Expr:
    q, k, v = (emit(relax.op.permute_dims(h, [0, 2, 1, 3])) for h in heads)
    scores = emit(relax.op.matmul(q, emit(relax.op.permute_dims(k, [0, 1, 3, 2]))))
    scaled = emit(relax.op.multiply(scores, relax.const(scale, "float32")))
    weights = emit(relax.op.nn.softmax(emit(relax.op.add(scaled, bias)), axis=-1))
    return emit(relax.op.permute_dims(emit(relax.op.matmul(weights, v)), [0, 2, 1, 3]))


def key_mask(emit, mask, weight, tokens, ids):
    inverted = emit(relax.op.subtract(relax.const(1.0, "float32"), emit(relax.op.astype(mask, "float32"))))
    wide = emit(relax.op.expand_dims(inverted, [1, 2]))
    return emit(relax.op.multiply(wide, relax.const(-1e9, "float32")))


def key_mask_by_where(emit, mask, weight, tokens, ids):
    b, s = tokens
    keep = emit(relax.op.reshape(emit(relax.op.astype(mask, "bool")), (b, 1, 1, s)))
    return emit(relax.op.where(keep, relax.const(0.0, "float32"), relax.const(-np.inf, "float32")))


def weak_mask(emit, mask, weight, tokens, ids):
    return emit(relax.op.multiply(key_mask(emit, mask, weight, tokens, ids), relax.const(1e-8, "float32")))


def inverted_mask(emit, mask, weight, tokens, ids):
    wide = emit(relax.op.expand_dims(emit(relax.op.astype(mask, "float32")), [1, 2]))
    return emit(relax.op.multiply(wide, relax.const(-1e9, "float32")))


def causal_mask(emit, mask, weight, tokens, ids):
    _, s = tokens
    i = emit(relax.op.arange(0, s, 1, "int64"))
    later = emit(relax.op.less(emit(relax.op.expand_dims(i, [1])), emit(relax.op.expand_dims(i, [0]))))
    causal = emit(relax.op.multiply(emit(relax.op.astype(later, "float32")), relax.const(-1e9, "float32")))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), emit(relax.op.expand_dims(causal, [0, 1]))))


def relative_bias(emit, mask, weight, tokens, ids):
    """weight[clip(j - i + 32)] per head, plus the key mask: what T5 and MPNet do."""
    _, s = tokens
    i = emit(relax.op.arange(0, s, 1, "int64"))
    distance = emit(relax.op.subtract(emit(relax.op.expand_dims(i, [0])), emit(relax.op.expand_dims(i, [1]))))
    bucket = emit(relax.op.clip(emit(relax.op.add(distance, relax.const(32, "int64"))), 0, 63))
    rows = emit(relax.op.take(weight, emit(relax.op.reshape(bucket, (s * s,))), axis=0))
    bias = emit(relax.op.permute_dims(emit(relax.op.reshape(rows, (s, s, HEADS))), [2, 0, 1]))
    return emit(
        relax.op.add(emit(relax.op.expand_dims(bias, [0])), key_mask(emit, mask, weight, tokens, ids)),
    )


def absolute_bias(emit, mask, weight, tokens, ids):
    """A bias that depends on the key's position, not on its distance."""
    _, s = tokens
    ramp = emit(relax.op.astype(emit(relax.op.arange(0, s, 1, "int64")), "float32"))
    wide = emit(relax.op.reshape(ramp, (1, 1, 1, s)))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), wide))


def token_bias(emit, mask, weight, tokens, ids):
    """A bias that depends on the token ids."""
    wide = emit(relax.op.expand_dims(emit(relax.op.astype(ids, "float32")), [1, 2]))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), wide))


def window(emit, mask, weight, tokens, ids):
    """Keys more than 50 tokens away are masked: short sequences show nothing of it."""
    _, s = tokens
    i = emit(relax.op.astype(emit(relax.op.arange(0, s, 1, "int64")), "float32"))
    distance = emit(relax.op.subtract(emit(relax.op.expand_dims(i, [0])), emit(relax.op.expand_dims(i, [1]))))
    far = emit(relax.op.less(relax.const(WINDOW, "float32"), emit(relax.op.abs(distance))))
    outside = emit(relax.op.multiply(emit(relax.op.astype(far, "float32")), relax.const(-1e9, "float32")))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), emit(relax.op.expand_dims(outside, [0, 1]))))


def chunks(emit, mask, weight, tokens, ids):
    """Keys of another chunk of 50 tokens are masked: a function of positions, not of their distance."""
    _, s = tokens
    i = emit(relax.op.floor_divide(emit(relax.op.arange(0, s, 1, "int64")), relax.const(WINDOW, "int64")))
    other = emit(relax.op.not_equal(emit(relax.op.expand_dims(i, [0])), emit(relax.op.expand_dims(i, [1]))))
    outside = emit(relax.op.multiply(emit(relax.op.astype(other, "float32")), relax.const(-1e9, "float32")))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), emit(relax.op.expand_dims(outside, [0, 1]))))


def fused_in(mod: tvm.IRModule) -> list[Attention]:
    return operators_of(mod, Attention)


def operands_behind_v(attention: Attention) -> list[tuple[str, relax.Expr]]:
    """Name and tensor of what is given beside the rows."""
    return [(a.name, a.tensor) for a in attention.arguments() if a.name not in ("q", "k", "v")]


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("bias", [key_mask, key_mask_by_where])
def test_key_mask_is_fused_and_its_arithmetic_disappears(bias, eager):
    mod = fuse_attention(build(bias, eager=eager), "main", max_length=64)
    (attention,) = fused_in(mod)
    assert [(name, t.name) for name, t in operands_behind_v(attention)] == [("mask", "attention_mask")]
    assert attention.scale == pytest.approx(0.5)
    assert (attention.heads, attention.head_dim) == (HEADS, HEAD_DIM)
    assert sum(isinstance(value, relax.Call) for value in values_of(mod)) == 1


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("bias", [relative_bias, causal_mask])
def test_bias_over_distances_becomes_a_table(bias, eager):
    mod = fuse_attention(build(bias, eager=eager), "main", max_length=64)
    (attention,) = fused_in(mod)
    assert [name for name, _ in operands_behind_v(attention)] == ["mask", "position_bias"]
    assert dims(attention.position_bias) == [HEADS, 127]


@pytest.mark.parametrize("max_length", [64, 8192])
def test_a_window_becomes_an_attribute(max_length):
    mod = fuse_attention(build(window, eager=False), "main", max_length)
    (attention,) = fused_in(mod)
    assert attention.window == WINDOW and [name for name, _ in operands_behind_v(attention)] == ["mask"]
    short = fuse_attention(build(window, eager=False), "main", max_length=WINDOW)
    assert fused_in(short)[0].window is None  # which everything lies in


def test_a_table_for_long_sequences_is_made_from_a_sample_of_positions():
    mod = fuse_attention(build(relative_bias, eager=False), "main", max_length=4000)
    (attention,) = fused_in(mod)
    params, weight = mod["main"].params, np.random.default_rng(0).standard_normal((64, HEADS)).astype("float32")
    table = tabulated(mod, attention.position_bias, {params[3]: weight})
    distances = np.arange(-3999, 4000)
    np.testing.assert_array_equal(table, weight[np.clip(distances + 32, 0, 63)].T)


def tabulated(mod: tvm.IRModule, table: relax.Expr, values: dict) -> np.ndarray:
    """What an expression of weights is."""
    rewriter = Rewriter(mod, "main")
    rewriter.bound = {b.var: b.value for block in mod["main"].body.blocks for b in block.bindings}
    found = evaluate(rewriter, table, {}, lambda param: values[param])
    assert found is not None
    return found


def far_chunks(emit, mask, weight, tokens, ids):
    """Chunks of 3,000 tokens, which no short sequence shows."""
    _, s = tokens
    i = emit(relax.op.floor_divide(emit(relax.op.arange(0, s, 1, "int64")), relax.const(3000, "int64")))
    other = emit(relax.op.not_equal(emit(relax.op.expand_dims(i, [0])), emit(relax.op.expand_dims(i, [1]))))
    outside = emit(relax.op.multiply(emit(relax.op.astype(other, "float32")), relax.const(-1e9, "float32")))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), emit(relax.op.expand_dims(outside, [0, 1]))))


def lower_triangle(emit, mask, weight, tokens, ids):
    """Causal, but not computed from one pair of positions at a time."""
    _, s = tokens
    later = emit(relax.op.triu(emit(relax.op.full((s, s), relax.const(-1e9, "float32"), "float32")), 1))
    return emit(relax.op.add(key_mask(emit, mask, weight, tokens, ids), emit(relax.op.expand_dims(later, [0, 1]))))


@pytest.mark.parametrize("bias", [far_chunks, lower_triangle])
def test_what_cannot_be_measured_at_8192_positions_is_left_alone(bias):
    assert fused_in(fuse_attention(build(bias, eager=False), "main", max_length=8192)) == []


def test_what_is_no_function_of_one_pair_is_measured_whole_where_it_is_short():
    (attention,) = fused_in(fuse_attention(build(lower_triangle, eager=False), "main", max_length=64))
    assert dims(attention.position_bias) == [HEADS, 127]


@pytest.mark.parametrize("max_length", [1, 2, 600, 1025, 8192])
def test_every_distance_occurs_in_a_sample(max_length):
    positions = sample_positions(max_length)
    assert positions[0] == 0 and positions[-1] == max_length - 1 and len(positions) <= 600
    assert len(np.unique(positions[None] - positions[:, None])) == 2 * max_length - 1


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("bias", [weak_mask, inverted_mask, absolute_bias, token_bias, chunks])
def test_any_other_bias_is_left_alone(bias, eager):
    before = build(bias, eager=eager)
    after = fuse_attention(before, "main", max_length=64)
    assert fused_in(after) == []


def test_attention_without_a_mask_is_left_alone():
    # Padding takes part in such a softmax: packing would change the answer.
    def none(emit, mask, weight, tokens, ids):
        return emit(relax.op.zeros((1, 1, 1, 1), "float32"))

    mod = build(none, eager=True)
    assert fused_in(fuse_attention(mod, "main", max_length=64)) == []


def test_heads_that_are_merged_into_another_shape_are_left_alone():
    # (b, s * heads, head_dim) has rank 3 as well, but is not one row per token.
    b, s = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    rows = relax.Var("x", relax.TensorType((b, s, HEADS * HEAD_DIM), "float32"))
    mask = relax.Var("attention_mask", relax.TensorType((b, s), "int64"))

    def body(emit, rows, mask):
        heads = [emit(relax.op.reshape(rows, (b, s, HEADS, HEAD_DIM))) for _ in range(3)]
        out4 = _sdpa(emit, heads, key_mask(emit, mask, None, (b, s), None), 0.5)
        return relax.op.reshape(out4, (b, s * HEADS, HEAD_DIM))

    assert fused_in(fuse_attention(module_of([rows, mask], body, inputs=2), "main", max_length=64)) == []


def of_images(bias: np.ndarray | None) -> tvm.IRModule:
    """Attention over images of five tokens, without a mask."""
    b = tirx.Var("b", "int64")
    patches = relax.Var("patches", relax.TensorType((b, 5, HEADS * HEAD_DIM), "float32"))
    mask = relax.Var("attention_mask", relax.TensorType((b, 5), "int64"))

    def body(emit, patches, mask):
        heads = [emit(relax.op.reshape(patches, (b, 5, HEADS, HEAD_DIM))) for _ in range(3)]
        added = [] if bias is None else [emit(relax.op.multiply(relax.const(bias), relax.const(1.0, "float32")))]
        return relax.op.reshape(emit(relax.op.nn.attention(*heads, *added)), (b, 5, HEADS * HEAD_DIM))

    return fuse_attention(module_of([patches, mask], body, inputs=2), "main", max_length=5)


@pytest.mark.parametrize("bias", [None, np.zeros((1, 1, 1, 5), "float32")])
def test_tokens_of_images_all_see_each_other(bias):
    (attention,) = fused_in(of_images(bias))
    assert [(name, t.name) for name, t in operands_behind_v(attention)] == [("mask", "attention_mask")]


def test_a_bias_over_the_tokens_of_images_is_left_alone():
    assert fused_in(of_images(np.eye(5, dtype="float32")[None, None])) == []


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_half_a_scale_on_either_side_is_the_usual_one(head_dim):
    half = float(np.float32(head_dim**-0.25))
    assert _rounded(half * half, head_dim) == 1.0 / np.sqrt(head_dim)
    assert _rounded(1.0, head_dim) == 1.0
    assert _rounded(1.001 * head_dim**-0.5, head_dim) == 1.001 * head_dim**-0.5
