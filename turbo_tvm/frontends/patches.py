"""Models of images take patches, one token each, in the place of pixels: for both importers."""

from __future__ import annotations

from tvm import ir

from turbo_tvm.artifact.manifest import ImageSpec, RequestLimits
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends import import_passes


def patches_of(mod: ir.IRModule, name: str) -> tuple[ir.IRModule, RequestLimits]:
    """Return the module on patches, and what an image is.

    mod: `encode(pixels, weights...)`, pixels fp32 (batch, channels, height, width) with a symbolic batch.
    name: of the model, for the error.

    Raises UnsupportedModelError for a graph that does not begin with patches.
    """
    mod, patches = import_passes.images(mod)
    if patches is None:
        raise UnsupportedModelError(
            f"{name} does not begin with patches: a convolution whose stride is its kernel, class tokens and positions "
            "in one sum, as in ViT; other models of images are not supported"
        )
    image = ImageSpec(**vars(patches))
    return mod, RequestLimits(max_length=image.tokens, vocab_size=0, image=image)
