"""Images: rows of patches against PyTorch's unfold, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbo_tvm.artifact.manifest import ImageSpec
from turbo_tvm.errors import InputError
from turbo_tvm.runtime import images
from turbo_tvm.runtime.batch import join

BOUNDS = ImageSpec(channels=2, height=7, width=9, patch_height=2, patch_width=3, prefix=2)
GIVEN = images.random_images(5, BOUNDS, seed=0)


@pytest.mark.parametrize("row_tile", [1, 4, 6])
@pytest.mark.parametrize("count", [1, 5])
def test_rows_are_those_of_a_convolution(count, row_tile):
    rows = images.pack_patches(GIVEN[:count], BOUNDS, row_tile)
    assert rows.dtype == np.float32 and rows.shape == (-(-count * 11 // row_tile), row_tile, 12)
    flat = rows.reshape(-1, 12)
    assert not flat[count * 11 :].any()
    whole = torch.from_numpy(np.stack(GIVEN[:count])[:, :, :6])
    patches = torch.nn.functional.unfold(whole, (2, 3), stride=(2, 3)).transpose(1, 2).numpy()
    for tokens, wanted in zip(flat[: count * 11].reshape(count, 11, 12), patches, strict=True):
        assert not tokens[:2].any()
        np.testing.assert_array_equal(tokens[2:], wanted)


def test_a_batch_of_images():
    batch = images.from_images(GIVEN, BOUNDS)
    assert batch.lengths.tolist() == [11] * 5 and len(batch.token_ids) == 55
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(11), 5))
    assert batch.images is not None and all(a is b for a, b in zip(batch.images, GIVEN, strict=True))
    again = join([batch.part(0, 2), batch.part(2, 5)])
    for got, wanted in zip(again[:4], batch[:4], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert again.images is not None and all(a is b for a, b in zip(again.images, GIVEN, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        np.stack(GIVEN),
        torch.from_numpy(np.stack(GIVEN)),
        tuple(GIVEN),
        [torch.from_numpy(image).double().requires_grad_() for image in GIVEN],
        [image.tolist() for image in GIVEN],
        [np.asfortranarray(image) for image in GIVEN],
    ],
)
def test_every_kind_of_array(given):
    batch = images.from_images(given, BOUNDS)
    assert batch.images is not None and all(image.dtype == np.float32 for image in batch.images)
    np.testing.assert_allclose(np.stack(batch.images), np.stack(GIVEN), rtol=1e-6)


def test_an_image_that_is_answered_later_is_a_copy():
    mine = np.asfortranarray(GIVEN[0])
    batch = images.from_image(mine, BOUNDS)
    mine[...] = np.nan
    assert batch.images is not None and batch.images[0].flags.c_contiguous
    np.testing.assert_array_equal(batch.images[0], GIVEN[0])


def test_nan_is_the_callers_own_business():
    assert images.from_image(np.full(BOUNDS.shape, np.nan), BOUNDS).lengths.tolist() == [11]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the request is empty: at least one image"),
        (np.zeros((0, 2, 7, 9)), "the request is empty"),
        ("image", "a list of images is needed, not str"),
        (None, "a list of images is needed, not NoneType"),
        (3, "a list of images is needed, not int"),
        ([GIVEN[0], GIVEN[0][:1]], r"image 1 has shape \(1, 7, 9\); this model takes 2 channels of 7 x 9 pixels"),
        ([GIVEN[0].T], r"image 0 has shape \(9, 7, 2\)"),
        (GIVEN[0], r"image 0 has shape \(7, 9\)"),
        ([None], "image 0 has shape None"),
        ([[[1.0], [2.0, 3.0]]], "image 0 is not an array"),
        (["a"], r"image 0 has shape \(\)"),
        ([GIVEN[0].astype(np.uint8)], "image 0 holds uint8 values; an image is float32, scaled"),
        ([GIVEN[0] + 0j], "image 0 holds complex64 values"),
        ([torch.zeros(BOUNDS.shape, dtype=torch.bfloat16)], "bfloat16 tensor holds no .* or torch.float32 for images"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(InputError, match=message):
        images.from_images(given, BOUNDS)
