"""What a PyTorch module must be to be imported; says what is wrong before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.options import ImportOptions
from turbo_tvm.frontends.torch.wrapper import config_of, parameters_of
from turbo_tvm.ops.inputs import InputKind


def takes_images(model: nn.Module) -> bool:
    """Return whether its forward takes pixels."""
    return InputKind.PIXELS.parameter in parameters_of(model)


def check_module(model: Any) -> None:
    """Raise UnsupportedModelError for what is no module, not fp32, not on the CPU, a decoder, or takes other inputs."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    _check_weights(model)
    config = config_of(model)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a decoder (model type {config.model_type!r}); only encoders are supported"
        )
    if takes_images(model):
        _check_tower(model)
    else:
        _check_text(model)


def check_options(model: nn.Module, options: ImportOptions) -> None:
    """Raise UnsupportedModelError for options that say nothing about models of this kind."""
    if options.image_size is not None and not takes_images(model):
        raise UnsupportedModelError(
            f"image_size={options.image_size!r} is for models of images; {type(model).__name__} is not one"
        )
    if options.max_length is not None and takes_images(model):
        raise UnsupportedModelError(
            f"max_length={options.max_length} is for models of text; {type(model).__name__} takes images: "
            "give image_size"
        )


def _check_weights(model: nn.Module) -> None:
    odd = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if odd:
        raise UnsupportedModelError(
            f"the model's weights are {', '.join(sorted(odd))}; only torch.float32 is supported: call model.float()"
        )
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise UnsupportedModelError("the model's weights are not on the CPU: call model.cpu() first")


def _check_text(model: nn.Module) -> None:
    needed = {kind.parameter for kind in (InputKind.TOKEN_IDS, InputKind.ATTENTION_MASK)}
    missing = needed - set(parameters_of(model))
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}; "
            "an encoder's forward(input_ids, attention_mask, ...) is needed"
        )


def _check_tower(model: nn.Module) -> None:
    if InputKind.TOKEN_IDS.parameter in parameters_of(model):
        towers = [f"model.{part}" for part in ("text_model", "vision_model") if hasattr(model, part)]
        hint = f": compile {' and '.join(towers)} instead" if towers else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} takes images and text at once; models of one of them are supported{hint}"
        )
