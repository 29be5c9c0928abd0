"""Imported models of images on patches, one token each, in the place of pixels; from PyTorch and ONNX alike."""

from __future__ import annotations

from typing import Any

from tvm import ir

from turbo_tvm.artifact.manifest import Bounds, ImageBounds
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.passes.fuse_patches import fuse_patches
from turbo_tvm.passes.normalize import normalize

Size = int | tuple[int, int]
PIXELS = "pixel_values"


def patches_of(mod: ir.IRModule, name: str) -> tuple[ir.IRModule, Bounds]:
    """The module on patches in the place of images, and what an image is. Raises UnsupportedModelError.

    mod: `main(pixels, weights...)`, pixels fp32 (batch, channels, height, width) with a symbolic batch.
    """
    mod, patches = fuse_patches(normalize(mod))
    if patches is None:
        raise UnsupportedModelError(
            f"{name} does not begin with patches: a convolution whose stride is its kernel, class tokens and positions "
            "in one sum, as in ViT; other models of images are not supported"
        )
    image = ImageBounds(**vars(patches))
    return mod, Bounds(max_length=image.tokens, vocab_size=0, image=image)


def size_of(size: Any) -> tuple[int, int]:
    """(height, width) of what may be one number for both. Raises UnsupportedModelError."""
    found = (size, size) if isinstance(size, int) else tuple(size)
    if len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise UnsupportedModelError(f"image_size is (height, width) in pixels, or one number for both, not {size!r}")
    return found  # type: ignore[return-value]
