"""The call of a PyTorch model: from its padded matrices or pixel values to a batch, and from answers to its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from turbo_tvm.artifact.manifest import Manifest
from turbo_tvm.errors import InputError
from turbo_tvm.runtime import images, validation
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.executor import Results
from turbo_tvm.runtime.model_output import ModelOutput, like, to_matrix, to_numpy


class PaddedCall(NamedTuple):
    """A call that was checked."""

    batch: Batch
    shape: tuple[int, ...]  # of the matrix of token ids; () for images
    example: Any  # an array or tensor of the kind that outputs are to have


def from_arguments(
    manifest: Manifest, input_ids: Any, attention_mask: Any, token_type_ids: Any, options: dict[str, Any]
) -> PaddedCall:
    """Check what a PyTorch model of text or images would be called with. Raises InputError."""
    if options.pop("return_dict", None) not in (None, True):
        raise InputError("return_dict=False is not supported: outputs are always named")
    if manifest.request_limits.image is not None:
        matrices = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return _from_pixels(manifest, input_ids, **{**matrices, **options})
    refuse_options(options)
    if input_ids is None:
        raise InputError("input_ids are missing")
    ids, mask, types = (to_numpy(x) for x in (input_ids, attention_mask, token_type_ids))
    batch = validation.from_padded(
        ids,
        mask,
        types,
        manifest.request_limits,
        manifest.positions,
        contiguous=manifest.relative_positions or manifest.layout == "padded",
        first_token=manifest.pools_first or manifest.layout == "padded",
    )
    return PaddedCall(batch, np.shape(ids), input_ids)


def _from_pixels(
    manifest: Manifest, first: Any, pixel_values: Any = None, interpolate_pos_encoding: Any = None, **options: Any
) -> PaddedCall:
    """Check the call of a model of images. Their size is fixed: positions were interpolated when it was compiled."""
    refuse_options(options)
    pixels = first if pixel_values is None else pixel_values
    if pixels is None or (pixel_values is not None and first is not None):
        raise InputError("this model takes images: pixel_values (batch, channels, height, width), and nothing else")
    assert manifest.request_limits.image is not None  # `from_arguments` looked
    return PaddedCall(images.from_images(pixels, manifest.request_limits.image), (), pixels)


def to_output(manifest: Manifest, results: Results, call: PaddedCall) -> ModelOutput:
    """Return all outputs as arrays over the batch, padded with 0 as the call was, of the example's kind."""
    padded = {s.name: to_matrix(s, results[s.name], call.batch, call.shape) for s in manifest.outputs}
    return ModelOutput((name, like(value, call.example)) for name, value in padded.items())


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for options that are set: the compiled model knows none of them."""
    extra = [key for key, value in options.items() if value is not None and value is not False]
    if extra:
        raise InputError(f"the compiled model takes no {', '.join(extra)}")
