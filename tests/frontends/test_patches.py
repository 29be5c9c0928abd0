"""Images as patches: what a request then is, and graphs that do not begin with patches."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.artifact.manifest import ImageSpec
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.imported import inputs_of
from turbo_tvm.frontends.patches import patches_of
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import InputKind


def stem(stride: int) -> tvm.IRModule:
    """Two patches of 4 x 4, if the stride is 4, with a position each."""
    batch = tirx.Var("batch", "int64")
    pixels = relax.Var("pixel_values", relax.TensorType((batch, 3, 4, 8), "float32"))
    weight = relax.Var("weight", relax.TensorType((6, 3, 4, 4), "float32"))
    count = 1 + 4 // stride
    places = relax.Var("places", relax.TensorType((1, count, 6), "float32"))
    builder = relax.BlockBuilder()
    with builder.function(ENCODE, [pixels, weight, places], attrs={"num_input": 1}):
        with builder.dataflow():
            product = builder.emit(relax.op.nn.conv2d(pixels, weight, strides=[stride, stride]))
            flat = builder.emit(relax.op.reshape(product, (batch, 6, count)))
            rows = builder.emit(relax.op.permute_dims(flat, [0, 2, 1]))
            out = builder.emit_output(relax.op.add(rows, places))
        builder.emit_func_output(out)
    return builder.finalize()


def test_an_image_is_its_patches():
    mod, bounds = patches_of(stem(4), "a stem")
    assert inputs_of(mod) == (InputKind.PATCHES, InputKind.ATTENTION_MASK, InputKind.POSITION_IDS)
    assert bounds.image == ImageSpec(channels=3, height=4, width=8, patch_height=4, patch_width=4, prefix=0)
    assert (bounds.max_length, bounds.vocab_size) == (2, 0)


def test_patches_that_overlap():
    with pytest.raises(UnsupportedModelError, match="a model does not begin with patches: a convolution whose stride"):
        patches_of(stem(2), "a model")
