"""PyTorch models of images: their size, their channels, and the mask that they are given."""

from __future__ import annotations

import pytest
import torch
import transformers

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.torch import images

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.ViTModel(
        transformers.ViTConfig(**SIZES, image_size=(16, 24), patch_size=8, num_channels=2)
    ).eval()


def test_images_of_the_configured_size_or_of_another(vit):
    assert images._sample_pixels(vit, None).shape == (2, 2, 16, 24)
    assert images._sample_pixels(vit, 32).shape == (2, 2, 32, 32)


def test_positions_are_interpolated_for_another_size_alone(vit):
    assert images._call_arguments(vit, torch.zeros(2, 2, 16, 24)) == {}
    assert images._call_arguments(vit, torch.zeros(2, 2, 16, 32)) == {"interpolate_pos_encoding": True}


@torch.inference_mode()
def test_answers_are_the_models_own_and_no_hook_is_left(vit):
    pixels = images._sample_pixels(vit, None)
    fixed = images.FixedImages(vit, {})
    plain = fixed.plain(pixels)
    assert fixed.length == 1 + 2 * 3
    for got, wanted in zip(fixed(pixels), plain.values(), strict=True):
        torch.testing.assert_close(got, wanted)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in vit.modules())


def test_modules_that_say_too_little():
    with pytest.raises(UnsupportedModelError, match=r"Linear says no image size: give image_size=\(height, width\)"):
        images._sample_pixels(torch.nn.Linear(2, 2), None)
    with pytest.raises(UnsupportedModelError, match="Linear has no convolution"):
        images._sample_pixels(torch.nn.Linear(2, 2), 16)
