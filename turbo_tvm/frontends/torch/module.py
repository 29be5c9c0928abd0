"""Import PyTorch modules: what a model takes and allows is found out, then `export.to_relax` brings it over.

How a model derives position ids from token ids is found by trying: the rule whose explicit ids give the model's own
outputs is its rule. So is whether a token sees those after it. A model whose own mask says still more, and a decoder,
which answers otherwise behind fixed inputs, are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from turbo_tvm.artifact.manifest import PositionRule, RequestLimits
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.imported import Imported, labels_in, problem_type_in
from turbo_tvm.frontends.options import DEFAULT_MAX_LENGTH, DEFAULTS, ImportOptions
from turbo_tvm.frontends.sample import TOLERANCES, Sample, spread_lengths
from turbo_tvm.frontends.torch.checks import check_module, check_options, takes_images
from turbo_tvm.frontends.torch.export import to_relax
from turbo_tvm.frontends.torch.images import import_images
from turbo_tvm.frontends.torch.wrapper import (
    FixedInputs,
    config_of,
    encoder_of,
    parameters_of,
    sample_ids,
    sample_mask,
    tensors_of,
    type_vocab_size,
    vocab_size,
)
from turbo_tvm.ops.inputs import InputKind


def import_module(model: nn.Module, options: ImportOptions = DEFAULTS) -> Imported:
    """Import an encoder.

    model: a Hugging Face encoder with or without head, or any module whose `forward` takes `input_ids` and
        `attention_mask`, both int64 (batch, length), or `pixel_values`, fp32 (batch, channels, height, width). Its
        weights are fp32 on the CPU; it is put in evaluation mode while it is traced.
    options: max_length is what the configuration allows by default; image_size is for models of images, see
        `import_images`.

    Raises UnsupportedModelError with the reason.
    """
    check_module(model)
    check_options(model, options)
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        return import_images(model, options) if takes_images(model) else _import_texts(model, options)
    finally:
        for part, training in modes:
            part.training = training


def _import_texts(model: nn.Module, options: ImportOptions) -> Imported:
    long = _long_sample(model, options)
    positions = _position_rule(model)
    limit = _max_length(model, positions, options)
    ids, mask = (part[:, :limit] for part in _small(model))
    sample = _sample(model, ids, mask)
    wrapper = _wrapper(model, positions, limit, sample)
    mod, weights = _imported(wrapper, limit)
    return Imported(
        name=options.name or type(model).__name__,
        model_type=str(getattr(config_of(model), "model_type", type(model).__name__)),
        mod=mod,
        weights=weights,
        output_names=wrapper.output_names(),
        request_limits=RequestLimits(limit, vocab_size(model), type_vocab_size(model)),
        positions=positions,
        parameter_count=sum(p.numel() for p in model.parameters()),
        tokenizer=options.tokenizer,
        texts=options.texts,
        labels=labels_in(getattr(config_of(model), "id2label", None)),
        problem_type=problem_type_in(getattr(config_of(model), "problem_type", None)),
        samples=(sample, *_long_samples(model, long, limit)),
    )


def _long_sample(model: nn.Module, options: ImportOptions) -> Sample:
    """Return what the model answers to a sequence as long as it takes, asked before any shorter one.

    A model may be another one from some number of tokens on, such as BigBird, which attends in blocks then; a shorter
    sequence before makes it attend to all tokens from then on. Raises UnsupportedModelError for what does not run.
    """
    table = getattr(config_of(model), "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    longest = max(1, min(filter(None, (table, options.max_length, options.usual_length))))
    try:
        return _sample(model, *_alone(model, longest))
    except UnsupportedModelError:  # a table with rows before that of the first token: RoBERTa's
        first_row = (getattr(config_of(model), "pad_token_id", None) or 0) + 1
        return _sample(model, *_alone(model, max(1, min(longest, table - first_row))))


def _long_samples(model: nn.Module, long: Sample, limit: int) -> list[Sample]:
    """Return what the model answers to lengths that are spread to its longest.

    long: what it answered first, which may be longer, as padding takes no row of RoBERTa's table.
    """
    known = long.mask.shape[1]
    others = [_sample(model, *_alone(model, length)) for length in spread_lengths(limit) if length != known]
    return [long, *others] if known <= limit else others


def _small(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a small batch with padding: token ids and mask, int64 (batch, length)."""
    ids = sample_ids(model)
    return ids, sample_mask(ids)


def _alone(model: nn.Module, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a sequence without padding: token ids and mask, int64 (1, length)."""
    ids = sample_ids(model)[:1]
    drawn = torch.randint(0, vocab_size(model), (1, length), generator=torch.Generator().manual_seed(length))
    drawn[:, : min(length, ids.shape[1])] = ids[:, :length]
    return drawn, torch.ones_like(drawn)


@torch.inference_mode()
def _sample(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Sample:
    """Return what the model itself, without the wrapper, answers to a batch.

    Raises UnsupportedModelError for a model that cannot be run on token ids and a mask alone.
    """
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
    """Return the wrapper that leaves what the model answers for real tokens as it is.

    A causal mask is tried for models without a cache: what has one generates text. Raises UnsupportedModelError if no
    wrapper does.
    """
    encoder = encoder_of(model)
    encodes = encoder is not None and "past_key_values" not in parameters_of(encoder)
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
    """Return the rule whose explicit position ids reproduce what the model does without any, if it looks at them."""
    encoder = encoder_of(model)
    if encoder is None or InputKind.POSITION_IDS.parameter not in parameters_of(encoder):
        return PositionRule()
    ids = sample_ids(model)
    plain = FixedInputs(model, PositionRule())
    wanted = plain(*plain.example(ids))
    for rule in _candidate_rules(model):
        attempt = FixedInputs(model, rule)
        given = dict(zip(attempt.kinds, attempt.example(ids), strict=True))
        if _close(attempt(*given.values()), wanted):
            given[InputKind.POSITION_IDS] = torch.zeros_like(ids)
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


def _max_length(model: nn.Module, positions: PositionRule, options: ImportOptions) -> int:
    """Return the longest sequence in tokens: what is asked for, if the table of positions has as many rows."""
    asked = options.max_length
    table = getattr(config_of(model), "max_position_embeddings", None)
    offset = positions.offset + 1 if positions.kind == "count_non_pad" else positions.offset
    limit = int(table) - offset if table else None
    if asked is None:
        return min(filter(None, (limit, options.usual_length)), default=DEFAULT_MAX_LENGTH)
    if asked < 1 or (limit is not None and asked > limit):
        raise UnsupportedModelError(
            f"max_length={asked} is not possible: the model has positions for 1 to {limit} tokens"
        )
    return asked


def _imported(wrapper: FixedInputs, max_length: int) -> tuple[Any, list[Any]]:
    """Return `main(inputs..., weights...)` and the weights' values. Raises UnsupportedModelError."""
    try:
        return to_relax(wrapper, wrapper.kinds, wrapper.example(sample_ids(wrapper.model)), max_length)
    except Exception as error:  # whatever PyTorch's exporter and TVM's importer raise
        raise UnsupportedModelError(f"{type(wrapper.model).__name__} cannot be imported: {summary(error)}") from error
