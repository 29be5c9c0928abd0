"""Images as requests: checked, and cut into rows of patches. Pure functions over NumPy arrays.

A convolution whose stride is its kernel multiplies every patch with a matrix, so a patch is a token: a row of
`channels * patch_height * patch_width` values, in the order of the convolution's weight. Tokens without a patch, such
as a class token, are rows of zeros. (Method: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from turbo_tvm.artifact.manifest import ImageSpec
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import Batch, row_tile_count
from turbo_tvm.runtime.model_output import to_numpy


def from_images(images: Any, spec: ImageSpec, *, own: bool = False) -> Batch:
    """Check a list of images, arrays or torch tensors (channels, height, width), or one array of them.

    own: copy them, for callers that may change them before they are answered.

    Raises InputError, naming the image, for an empty request, another shape, and values that are not floating-point;
    NaN is allowed.
    """
    listed = images if isinstance(images, Sequence) else to_numpy(images)
    if isinstance(listed, str | bytes) or listed is None or (isinstance(listed, np.ndarray) and not listed.ndim):
        raise InputError(f"a list of images is needed, not {type(images).__name__}")
    if len(listed) == 0:
        raise InputError("the request is empty: at least one image is needed")
    arrays = tuple(_image(image, f"image {i}", spec, own) for i, image in enumerate(listed))
    return _batch(arrays, spec)


def from_image(image: Any, spec: ImageSpec) -> Batch:
    """Check one image as `from_images` does, and copy it."""
    return _batch((_image(image, "the image", spec, True),), spec)


def random_images(count: int, spec: ImageSpec, seed: int) -> list[np.ndarray]:
    """Return images of noise, float32 (channels, height, width) each, to measure with."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(spec.shape, np.float32) for _ in range(count)]


def pack_patches(images: Sequence[np.ndarray], spec: ImageSpec, row_tile: int) -> np.ndarray:
    """Return the tokens of all images as packed rows, float32 (tiles, row_tile, columns); surplus rows are 0."""
    (down, across), prefix = spec.grid, spec.prefix
    high, wide = spec.patch_height, spec.patch_width
    rows = np.empty((row_tile_count(len(images) * spec.tokens, row_tile) * row_tile, spec.columns), np.float32)
    for begin, image in zip(range(0, len(rows), spec.tokens), images, strict=False):
        rows[begin : begin + prefix] = 0
        patches = image[:, : down * high, : across * wide].reshape(spec.channels, down, high, across, wide)
        places = rows[begin + prefix : begin + spec.tokens].reshape(down, across, spec.channels, high, wide)
        places[...] = patches.transpose(1, 3, 0, 2, 4)
    rows[len(images) * spec.tokens :] = 0
    return rows.reshape(-1, row_tile, spec.columns)


def _batch(images: tuple[np.ndarray, ...], spec: ImageSpec) -> Batch:
    zeros = np.zeros(len(images) * spec.tokens, np.int32)
    positions = np.tile(np.arange(spec.tokens, dtype=np.int32), len(images))
    cu_seqlens = np.arange(0, len(zeros) + 1, spec.tokens, dtype=np.int32)
    return Batch(zeros, zeros, positions, cu_seqlens, images=images)


def _image(values: Any, what: str, spec: ImageSpec, own: bool) -> np.ndarray:
    try:
        array = to_numpy(values)
    except ValueError as error:
        raise InputError(f"{what} is not an array: {error}") from error
    channels, height, width = spec.shape
    if not isinstance(array, np.ndarray) or array.shape != spec.shape:
        shape = getattr(array, "shape", None)
        raise InputError(
            f"{what} has shape {shape}; this model takes {channels} channels of {height} x {width} pixels, "
            f"({channels}, {height}, {width}): compile it with another image_size= for others"
        )
    if array.dtype.kind != "f":
        raise InputError(
            f"{what} holds {array.dtype} values; an image is float32, scaled as the model's image processor does"
        )
    return np.array(array, np.float32, order="C") if own else array.astype(np.float32, copy=False)
