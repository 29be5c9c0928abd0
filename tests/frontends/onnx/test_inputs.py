"""Which input of an ONNX file is which, and a batch in the file's own types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tvm import tirx

from turbo_tvm.artifact.manifest import PositionRule
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.onnx.inputs import OnnxInputs, read_inputs
from turbo_tvm.ops.inputs import InputKind

PATH = Path("model.onnx")
TOKENS = ("batch", "length")


def model(nodes=(), weights=(), dtype: int = TensorProto.INT64, **inputs: tuple) -> onnx.ModelProto:
    declared = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()]
    return helper.make_model(helper.make_graph(list(nodes), "graph", declared, [], list(weights)))


def read(image_size=None, **what) -> OnnxInputs:
    return read_inputs(PATH, model(**what), image_size)


def images(*shape, conv: bool = True, image_size=None) -> OnnxInputs:
    """Of a file whose only input is images, which a convolution of three channels reads."""
    weights = [numpy_helper.from_array(np.ones((8, 3, 4, 4), np.float32), "w")]
    nodes = [helper.make_node("Conv", ["pixels", "w"], ["out"])]
    return read(image_size, nodes=nodes if conv else (), weights=weights, dtype=TensorProto.FLOAT, pixels=shape)


def test_names_of_exporters():
    found = read(input=TOKENS, input_mask=TOKENS, segment_ids=TOKENS, position_ids=TOKENS)
    assert found.names == {
        InputKind.TOKEN_IDS: "input",
        InputKind.ATTENTION_MASK: "input_mask",
        InputKind.TOKEN_TYPE_IDS: "segment_ids",
        InputKind.POSITION_IDS: "position_ids",
    }
    assert (found.batch, found.length, found.image) == (None, None, None)


def test_weights_among_the_inputs_are_none():
    table = numpy_helper.from_array(np.ones((9, 2), np.float32), "table")
    assert len(read(weights=[table], input_ids=TOKENS, attention_mask=TOKENS, table=(9, 2)).names) == 2


def test_fixed_dimensions():
    found = read(input_ids=(2, 24), attention_mask=("batch", 24))
    assert (found.batch, found.length) == (2, 24)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": TOKENS}, "takes input_ids: attention_mask is missing; an encoder with"),
        ({"attention_mask": TOKENS}, "input_ids is missing"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS, "past": TOKENS}, "past is not known"),
        (
            {"input_ids": TOKENS, "attention_mask": ("batch",)},
            r"attention_mask has 1 dimensions, not \(batch, length\)",
        ),
        ({"input_ids": (1, 24), "attention_mask": (1, 23)}, "its inputs have different dimensions"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_inputs(inputs, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(**inputs)


def test_a_batch_in_the_types_of_the_file():
    found = read(dtype=TensorProto.INT32, input_ids=TOKENS, attention_mask=TOKENS, position_ids=TOKENS)
    ids = np.array([[5, 1, 7]])
    fed = found.feed(ids, np.ones_like(ids), np.zeros_like(ids), PositionRule("count_non_pad", 1, 1))
    assert {name: (x.dtype, x.tolist()) for name, x in fed.items()} == {
        "input_ids": (np.int32, [[5, 1, 7]]),
        "attention_mask": (np.int32, [[1, 1, 1]]),
        "position_ids": (np.int32, [[2, 1, 3]]),
    }


def test_parameters_by_the_names_of_the_file():
    batch, length = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    made = read(input=TOKENS, mask=TOKENS).parameters(batch, length)
    assert {name: var.name for name, var in made.items()} == {"input": "input_ids", "mask": "attention_mask"}
    (pixels,) = images("batch", 3, 32, 48).parameters(batch, length).values()
    assert pixels.name == "pixel_values" and [int(d) for d in list(pixels.ty.shape)[1:]] == [3, 32, 48]


def test_images():
    assert images("batch", 3, 32, 48).image == images("batch", "channels", 32, "width", image_size=(32, 48)).image
    assert images(2, 3, 32, 32).batch == 2
    fed = images("batch", 3, 2, 2).feed_images(np.zeros((5, 3, 2, 2)))
    assert fed["pixels"].dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (("batch", "channels", 2, 2), {"conv": False}, "leaves open how many channels"),
        (("batch", 3, "height", 2), {}, r"leaves the size of its images open: give image_size=\(height, width\)"),
        (("batch", 3, 32, 32), {"image_size": 16}, "is for images of 32 x 32; image_size=16 is not"),
    ],
)
def test_images_that_do_not_fit(shape, options, message):
    with pytest.raises(UnsupportedModelError, match=message):
        images(*shape, **options)
