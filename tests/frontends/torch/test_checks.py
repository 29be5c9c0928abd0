"""Modules that are refused before any work."""

from __future__ import annotations

import pytest
import torch

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.options import ImportOptions
from turbo_tvm.frontends.torch.checks import check_module, check_options, takes_images


class Texts(torch.nn.Linear):
    def forward(self, input_ids, attention_mask):
        """Never called."""


class Images(torch.nn.Linear):
    def forward(self, pixel_values):
        """Never called."""


class Both(torch.nn.Linear):
    text_model = vision_model = None

    def forward(self, input_ids, pixel_values):
        """Never called."""


def test_texts_or_images():
    assert takes_images(Images(2, 2)) and not takes_images(Texts(2, 2))
    check_module(Images(2, 2))
    check_module(Texts(2, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (5, "a torch.nn.Module is needed, not int"),
        (Texts(2, 2).half(), r"weights are torch.float16; only torch.float32 is supported: call model.float\(\)"),
        (Texts(2, 2, device="meta"), r"not on the CPU: call model.cpu\(\) first"),
        (torch.nn.Linear(2, 2), r"Linear.forward takes no attention_mask and no input_ids; an encoder's forward\("),
        (Both(2, 2), "takes images and text at once; .*: compile model.text_model and model.vision_model instead"),
    ],
)
def test_other_modules(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_module(model)


def test_options_of_the_other_kind():
    check_options(Texts(2, 2), ImportOptions(max_length=9))
    check_options(Images(2, 2), ImportOptions(image_size=16))
    with pytest.raises(UnsupportedModelError, match="image_size=16 is for models of images; Texts is not one"):
        check_options(Texts(2, 2), ImportOptions(image_size=16))
    with pytest.raises(UnsupportedModelError, match="max_length=9 is for models of text; Images takes images"):
        check_options(Images(2, 2), ImportOptions(max_length=9))
