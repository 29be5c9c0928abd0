"""What every frontend returns."""

from __future__ import annotations

import pytest
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.frontends.imported import inputs_of, labels_in
from turbo_tvm.ops.inputs import InputKind


def test_inputs_come_before_weights():
    @I.ir_module
    class Module:
        @R.function
        def encode(
            patches: R.Tensor(("b", 4, 12), "float32"),
            attention_mask: R.Tensor(("b", 4), "int64"),
            weight: R.Tensor((12, 8), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                y = R.matmul(patches, weight)
                R.output(y)
            return y

    assert inputs_of(Module) == (InputKind.PATCHES, InputKind.ATTENTION_MASK)


@pytest.mark.parametrize(("name", "images"), [("bert", False), ("vit", True)])
def test_texts_and_images(served, name, images):
    imported = served(name).imported()
    first = InputKind.PATCHES if images else InputKind.TOKEN_IDS
    assert imported.takes_images is images and imported.inputs[0] is first
    assert (imported.request_limits.image is not None) is images


@pytest.mark.parametrize(
    ("named", "labels"),
    [
        ({0: "cat", 1: "dog"}, ("cat", "dog")),
        ({"1": "dog", "0": "cat"}, ("cat", "dog")),
        ({0: "cat", 2: "dog"}, ()),
        ({0: "cat", 1: 7}, ()),
        ({}, ()),
        (None, ()),
        (["cat"], ()),
    ],
    ids=str,
)
def test_labels(named, labels):
    assert labels_in(named) == labels
