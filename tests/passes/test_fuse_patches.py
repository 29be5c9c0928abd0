"""Images as patches: what embeds them in every spelling, and what must be left alone."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.passes.fuse_patches import Patches, fuse_patches
from turbo_tvm.passes.rewriter import shape_of

CHANNELS, HEIGHT, WIDTH, HIDDEN = 2, 7, 9, 4  # a row and a column are left over
KERNEL = (2, 3)
DOWN, ACROSS = HEIGHT // KERNEL[0], WIDTH // KERNEL[1]


def build(arrange, *, inputs=1, batch=None, dtype="float32", **conv) -> tvm.IRModule:
    """`main(pixels, weight, class, positions (1, 10, 4), bias)`: `arrange(emit, convolution, batch, params)`."""
    b = tirx.Var("b", "int64") if batch is None else batch
    pixels = relax.Var("pixels", relax.TensorType((b, CHANNELS, HEIGHT, WIDTH), dtype))
    shapes = {
        "weight": (HIDDEN, CHANNELS // conv.get("groups", 1), *KERNEL),
        "first": (1, 1, HIDDEN),
        "positions": (1, DOWN * ACROSS + 1, HIDDEN),
        "bias": (HIDDEN,),
    }
    weights = {name: relax.Var(name, relax.TensorType(shape, dtype)) for name, shape in shapes.items()}
    bb = relax.BlockBuilder()
    with bb.function("main", [pixels, *weights.values()], attrs={"num_input": inputs}):
        with bb.dataflow():
            product = bb.emit(relax.op.nn.conv2d(pixels, weights["weight"], **{"strides": KERNEL, **conv}))
            out = bb.emit_output(arrange(bb.emit, product, b, {"pixels": pixels, **weights}))
        bb.emit_func_output(out)
    return bb.finalize()


def rows(emit, product, batch):
    """(batch, patches, hidden)."""
    flat = emit(relax.op.reshape(product, (batch, HIDDEN, -1)))
    return emit(relax.op.permute_dims(flat, [0, 2, 1]))


def vit(emit, product, batch, w):
    shifted = emit(relax.op.add(product, emit(relax.op.reshape(w["bias"], (1, HIDDEN, 1, 1)))))
    first = emit(relax.op.broadcast_to(w["first"], (batch, 1, HIDDEN)))
    joined = emit(relax.op.concat([first, rows(emit, shifted, batch)], axis=1))
    tokens = emit(relax.op.add(w["positions"], joined))
    return emit(relax.op.multiply(tokens, tokens))  # what follows reads the tokens twice


def channels_last(emit, product, batch, w):
    """No class token, positions taken from a table, and another way to the rows."""
    turned = emit(relax.op.permute_dims(product, [0, 2, 3, 1]))
    tokens = emit(relax.op.reshape(turned, (batch, DOWN * ACROSS, HIDDEN)))
    places = emit(relax.op.take(w["positions"], relax.const(np.arange(DOWN * ACROSS), "int64"), axis=1))
    return emit(relax.op.nn.relu(emit(relax.op.add(tokens, places))))


def run(mod: tvm.IRModule, inputs: list[np.ndarray]) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()


@pytest.mark.parametrize(("arrange", "prefix"), [(vit, 1), (channels_last, 0)])
def test_patches_give_what_the_image_gave(arrange, prefix):
    before = build(arrange)
    after, patches = fuse_patches(before, "main")
    assert patches == Patches(CHANNELS, HEIGHT, WIDTH, *KERNEL, prefix)
    main = after["main"]
    tokens, columns = prefix + DOWN * ACROSS, CHANNELS * KERNEL[0] * KERNEL[1]
    assert [p.name for p in main.params[:3]] == ["patches", "attention_mask", "position_ids"]
    assert shape_of(main.params[0])[1:] == [tokens, columns] and int(main.attrs["num_input"]) == 3
    assert "conv2d" not in after.script()

    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((3, CHANNELS, HEIGHT, WIDTH), np.float32)
    weights = [rng.standard_normal(shape_of(p), np.float32) for p in main.params[3:]]
    cut = np.zeros((3, tokens, columns), np.float32)
    for i in range(DOWN):
        for j in range(ACROSS):
            high, wide = KERNEL
            patch = pixels[:, :, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            cut[:, prefix + i * ACROSS + j] = patch.reshape(3, -1)
    places = np.tile(np.arange(tokens), (3, 1))
    got = run(after, [cut, np.ones_like(places), places, *weights])
    np.testing.assert_allclose(got, run(before, [pixels, *weights]), rtol=1e-5, atol=1e-5)


def class_last(emit, product, batch, w):
    first = emit(relax.op.broadcast_to(w["first"], (batch, 1, HIDDEN)))
    return emit(relax.op.nn.relu(emit(relax.op.concat([rows(emit, product, batch), first], axis=1))))


def column_by_column(emit, product, batch, w):
    turned = emit(relax.op.permute_dims(product, [0, 3, 2, 1]))
    return emit(relax.op.nn.relu(emit(relax.op.reshape(turned, (batch, DOWN * ACROSS, HIDDEN)))))


def twice(emit, product, batch, w):
    tokens = rows(emit, product, batch)
    return emit(relax.op.nn.relu(emit(relax.op.add(tokens, rows(emit, product, batch)))))


def tokens_alone(emit, product, batch, w):
    return emit(relax.op.nn.relu(rows(emit, product, batch)))


def a_map(emit, product, batch, w):
    return emit(relax.op.nn.relu(product))


def pixels_again(emit, product, batch, w):
    total = emit(relax.op.sum(w["pixels"], axis=[1, 2, 3]))
    return emit(relax.op.add(vit(emit, product, batch, w), emit(relax.op.reshape(total, (batch, 1, 1)))))


OTHERS = {
    "a class token at the end": (class_last, {}),
    "patches in another order": (column_by_column, {}),
    "a convolution that is read twice": (twice, {}),
    "no tokens": (a_map, {}),
    "pixels that are read again": (pixels_again, {}),
    "patches that overlap": (tokens_alone, {"strides": (1, 3)}),
    "padding": (tokens_alone, {"padding": (1, 0)}),
    "dilation": (tokens_alone, {"dilation": (2, 1)}),
    "groups": (tokens_alone, {"groups": 2}),
    "a fixed batch": (vit, {"batch": 2}),
    "other numbers": (vit, {"dtype": "float16"}),
    "a second input": (vit, {"inputs": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_left_alone(name):
    arrange, options = OTHERS[name]
    before = build(arrange, **options)
    after, patches = fuse_patches(before, "main")
    assert patches is None
    tvm.ir.assert_structural_equal(after, before)
