"""Import PyTorch models of images: what they take is found out, and images become patches, one token each."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from turbo_tvm.artifact.manifest import PositionRule
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.imported import Imported, labels_in, problem_type_in
from turbo_tvm.frontends.options import ImportOptions, Size, size_of
from turbo_tvm.frontends.patches import patches_of
from turbo_tvm.frontends.sample import ImageSample
from turbo_tvm.frontends.torch.export import to_relax
from turbo_tvm.frontends.torch.wrapper import config_of, encoder_of, parameters_of, tensors_of
from turbo_tvm.ops.inputs import InputKind

_PIXELS = InputKind.PIXELS.parameter
_INTERPOLATE = "interpolate_pos_encoding"  # what transformers calls the argument


def import_images(model: nn.Module, options: ImportOptions) -> Imported:
    """Import a model whose `forward` takes `pixel_values`, (batch, channels, height, width), for images of one size.

    model: checked, in evaluation mode.
    options: image_size is the configuration's by default. Another one needs a model that interpolates its positions,
        which is then done once, here.

    Raises UnsupportedModelError with the reason.
    """
    pixels = _sample_pixels(model, options.image_size)
    wrapper = FixedImages(model, _call_arguments(model, pixels))
    outputs = _answers(wrapper, pixels)
    try:
        mod, weights = to_relax(wrapper, (InputKind.PIXELS,), (pixels,), None)
    except Exception as error:  # whatever PyTorch's exporter and TVM's importer raise
        raise UnsupportedModelError(f"{type(model).__name__} cannot be imported: {summary(error)}") from error
    mod, limits = patches_of(mod, type(model).__name__)
    return Imported(
        name=options.name or type(model).__name__,
        model_type=str(getattr(config_of(model), "model_type", type(model).__name__)),
        mod=mod,
        weights=weights,
        output_names=tuple(outputs),
        request_limits=limits,
        positions=PositionRule("arange"),
        parameter_count=sum(p.numel() for p in model.parameters()),
        labels=labels_in(getattr(config_of(model), "id2label", None)),
        problem_type=problem_type_in(getattr(config_of(model), "problem_type", None)),
        samples=(ImageSample(pixels.numpy(), {key: value.numpy() for key, value in outputs.items()}),),
    )


class FixedImages(nn.Module):
    """A model of images with its outputs as a tuple of tensors, and without a mask: its images have no padding.

    Left to itself a Hugging Face model makes a mask in ways that cannot be exported; it takes an additive one as it is.
    """

    def __init__(self, model: nn.Module, arguments: dict[str, Any]):
        """arguments: what the model's call is given besides the pixels."""
        super().__init__()
        self.model = model
        self.encoder = encoder_of(model)
        self.arguments = arguments
        self.length = 0  # tokens of an image, once it ran

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Answer pixels, fp32 (batch, channels, height, width)."""
        masked = self.encoder is not None and InputKind.ATTENTION_MASK.parameter in parameters_of(self.encoder)
        with ExitStack() as hooks:
            if self.encoder is not None and self.length and masked:
                handle = self.encoder.register_forward_pre_hook(self._unmasked, with_kwargs=True)
                hooks.callback(handle.remove)
            return tuple(tensors_of(self.model(**{_PIXELS: inputs[0]}, **self.arguments)).values())

    def plain(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model itself answers, by name; notes how many tokens an image is."""
        with ExitStack() as hooks:
            if self.encoder is not None:
                handle = self.encoder.base_model.register_forward_hook(self._count)  # type: ignore[union-attr]
                hooks.callback(handle.remove)
            return tensors_of(self.model(**{_PIXELS: pixels}, **self.arguments))

    def _unmasked(self, _encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {InputKind.ATTENTION_MASK.parameter: torch.zeros(1, 1, 1, self.length)}

    def _count(self, _encoder: nn.Module, _args: tuple, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        self.length = hidden.shape[1] if isinstance(hidden, torch.Tensor) and hidden.dim() == 3 else 0


def _sample_pixels(model: nn.Module, image_size: Size | None) -> torch.Tensor:
    """Make two images of noise."""
    height, width = size_of(_configured_size(model) if image_size is None else image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, _channels(model), height, width, generator=generator)


def _configured_size(model: nn.Module) -> Size:
    size = getattr(config_of(model), "image_size", None)
    if size is None:
        raise UnsupportedModelError(f"{type(model).__name__} says no image size: give image_size=(height, width)")
    return size


def _channels(model: nn.Module) -> int:
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no convolution (torch.nn.Conv2d) to embed patches")
    return int(conv.in_channels)


def _call_arguments(model: nn.Module, pixels: torch.Tensor) -> dict[str, Any]:
    """Return what the call needs for images of this size: for another than the configured one, interpolation."""
    size = tuple(pixels.shape[2:])
    known = getattr(config_of(model), "image_size", None)
    if known is None or size_of(known) == size or _INTERPOLATE not in parameters_of(model):
        return {}
    return {_INTERPOLATE: True}


@torch.inference_mode()
def _answers(wrapper: FixedImages, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the model itself answers, by name. Raises UnsupportedModelError if it cannot be run."""
    try:
        return wrapper.plain(pixels)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the model's own code raises
        size = " x ".join(map(str, pixels.shape[2:]))
        raise UnsupportedModelError(
            f"{type(wrapper.model).__name__} cannot be run on pixel_values of {size} alone: {summary(error)}"
        ) from error
