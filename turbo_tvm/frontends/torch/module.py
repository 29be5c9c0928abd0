"""PyTorch modules to Relax: what a model takes and allows is found out, then `torch_export` brings it over.

How a model derives position ids from token ids is found by trying: the rule whose explicit ids give the model's own
outputs is its rule. So is whether a token sees those after it. A model whose own mask says still more, and a decoder,
which answers otherwise behind fixed inputs, are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from turbo_tvm.artifact.manifest import Bounds, PositionRule
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.images import import_images
from turbo_tvm.frontends.imported import DEFAULT_MAX_LENGTH, TOLERANCES, Imported, Sample, labels_in
from turbo_tvm.frontends.patches import PIXELS, Size
from turbo_tvm.frontends.torch.export import to_relax
from turbo_tvm.frontends.torch.wrapper import (
    FixedInputs,
    config_of,
    encoder_of,
    input_names_of,
    sample_ids,
    sample_mask,
    tensors_of,
    type_vocab_size,
    vocab_size,
)


def import_module(
    model: nn.Module,
    name: str | None = None,
    max_length: int | None = None,
    tokenizer: str | None = None,
    image_size: Size | None = None,
) -> Imported:
    """Import an encoder.

    model: a Hugging Face encoder with or without head, or any module whose `forward` takes `input_ids` and
        `attention_mask`, both `(batch, length)`, or `pixel_values`, `(batch, channels, height, width)`. fp32 weights on
        the CPU; it is put in evaluation mode while traced.
    max_length: the longest sequence in tokens; by default what the model's configuration allows.
    image_size: of a model of images, see `import_images`.

    Raises UnsupportedModelError with the reason.
    """
    _check_module(model)
    _check_options(model, max_length, image_size)
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        if takes_images(model):
            return import_images(model, name or type(model).__name__, image_size)
        _sample(model, None)  # whether it runs at all
        positions = _position_rule(model)
        limit = _max_length(model, positions, max_length)
        sample = _sample(model, limit)
        wrapper = _wrapper(model, positions, limit, sample)
        mod, weights = _imported(wrapper, limit)
        return Imported(
            name=name or type(model).__name__,
            model_type=str(getattr(config_of(model), "model_type", type(model).__name__)),
            mod=mod,
            weights=weights,
            output_names=wrapper.output_names(),
            bounds=Bounds(limit, vocab_size(model), type_vocab_size(model)),
            positions=positions,
            parameter_count=sum(p.numel() for p in model.parameters()),
            tokenizer=tokenizer,
            labels=labels_in(getattr(config_of(model), "id2label", None)),
            sample=sample,
        )
    finally:
        for part, training in modes:
            part.training = training


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    odd = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if odd:
        raise UnsupportedModelError(
            f"the model's weights are {', '.join(sorted(odd))}; only torch.float32 is supported: call model.float()"
        )
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise UnsupportedModelError("the model's weights are not on the CPU: call model.cpu() first")
    config = config_of(model)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a decoder (model type {config.model_type!r}); only encoders are supported"
        )
    if takes_images(model):
        _check_tower(model)
        return
    missing = {"input_ids", "attention_mask"} - set(input_names_of(model))
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}; "
            "an encoder's forward(input_ids, attention_mask, ...) is needed"
        )


def _check_options(model: nn.Module, max_length: int | None, image_size: Size | None) -> None:
    if image_size is not None and not takes_images(model):
        raise UnsupportedModelError(
            f"image_size={image_size!r} is for models of images; {type(model).__name__} is not one"
        )
    if max_length is not None and takes_images(model):
        raise UnsupportedModelError(
            f"max_length={max_length} is for models of text; {type(model).__name__} takes images: give image_size"
        )


def takes_images(model: nn.Module) -> bool:
    """Whether its forward takes pixels."""
    return PIXELS in input_names_of(model)


def _check_tower(model: nn.Module) -> None:
    if "input_ids" in input_names_of(model):
        towers = [f"model.{part}" for part in ("text_model", "vision_model") if hasattr(model, part)]
        hint = f": compile {' and '.join(towers)} instead" if towers else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} takes images and text at once; models of one of them are supported{hint}"
        )


@torch.inference_mode()
def _sample(model: nn.Module, longest: int | None) -> Sample:
    """What the model itself, without the wrapper, answers to a batch with padding."""
    ids = sample_ids(model)[:, :longest]
    mask = sample_mask(ids)
    try:
        outputs = tensors_of(model(input_ids=ids, attention_mask=mask))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run on input_ids and attention_mask alone: {summary(error)}"
        ) from error
    return Sample(ids.numpy(), mask.numpy(), {name: value.numpy() for name, value in outputs.items()})


@torch.inference_mode()
def _wrapper(model: nn.Module, positions: PositionRule, longest: int, sample: Sample) -> FixedInputs:
    """The wrapper that leaves what the model answers for real tokens as it is; UnsupportedModelError if none does.

    A causal mask is tried for models without a cache: what has one generates text.
    """
    encoder = encoder_of(model)
    encodes = encoder is not None and "past_key_values" not in input_names_of(encoder)
    for causal in (False, True) if encodes else (False,):
        wrapper = FixedInputs(model, positions, causal, longest)
        inputs = wrapper.example(torch.from_numpy(sample.token_ids), torch.from_numpy(sample.mask))
        if all(d <= TOLERANCES["fp32"] for d in sample.differences(wrapper.named(*inputs)).values()):
            return wrapper
    raise UnsupportedModelError(
        f"{type(model).__name__} attends otherwise than an encoder, where every token sees every token "
        "that is not padding (is it a decoder?); only encoders are supported"
    )


@torch.inference_mode()
def _position_rule(model: nn.Module) -> PositionRule:
    """The rule whose explicit position ids reproduce what the model does without any, if it looks at them."""
    encoder = encoder_of(model)
    if encoder is None or "position_ids" not in input_names_of(encoder):
        return PositionRule()
    ids = sample_ids(model)
    plain = FixedInputs(model, PositionRule())
    wanted = plain(*plain.example(ids))
    for rule in _candidate_rules(model):
        attempt = FixedInputs(model, rule)
        given = dict(zip(attempt.names, attempt.example(ids), strict=True))
        if _close(attempt(*given.values()), wanted):
            given["position_ids"] = torch.zeros_like(ids)
            return PositionRule() if _close(attempt(*given.values()), wanted) else rule
    raise UnsupportedModelError(
        f"{type(model).__name__}: no known rule gives the position ids that the model uses; "
        "the rules tried are 0, 1, 2, ... and RoBERTa's count of tokens that are not padding"
    )


def _close(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def _candidate_rules(model: nn.Module) -> list[PositionRule]:
    rules = [PositionRule("arange", 0)]
    pad = getattr(config_of(model), "pad_token_id", None)
    if pad is not None:
        rules.append(PositionRule("count_non_pad", int(pad), int(pad)))
        rules.append(PositionRule("count_non_pad", 1, 1))  # MPNet's padding index, whatever its pad token
    return rules


def _max_length(model: nn.Module, positions: PositionRule, asked: int | None) -> int:
    table = getattr(config_of(model), "max_position_embeddings", None)
    offset = positions.offset + 1 if positions.kind == "count_non_pad" else positions.offset
    limit = int(table) - offset if table else None
    if asked is None:
        return limit or DEFAULT_MAX_LENGTH
    if asked < 1 or (limit is not None and asked > limit):
        raise UnsupportedModelError(
            f"max_length={asked} is not possible: the model has positions for 1 to {limit} tokens"
        )
    return asked


def _imported(wrapper: FixedInputs, max_length: int) -> tuple[Any, list[Any]]:
    try:
        return to_relax(wrapper, wrapper.names, wrapper.example(sample_ids(wrapper.model)), max_length)
    except Exception as error:  # whatever PyTorch's exporter and TVM's importer raise
        raise UnsupportedModelError(f"{type(wrapper.model).__name__} cannot be imported: {summary(error)}") from error
