"""PyTorch modules: through `torch.export` to Relax, with symbolic batch and length.

The module is exported behind a wrapper that fixes its inputs. A Hugging Face encoder, the module itself or one inside
it, gets through a hook what its own code would compute in ways that cannot be exported with symbolic shapes: its mask
(as the additive 4-D mask that it accepts as it is), its position ids and its token types. How it derives position ids
from token ids is found by trying: the rule whose explicit ids give the model's own outputs is its rule.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
import tvm
from torch import nn
from tvm import ir, relax
from tvm.relax.frontend.torch import from_exported_program

from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.passes.rewriter import builder_without_main, substitute
from turbo_tvm.runtime.batch import position_ids
from turbo_tvm.runtime.manifest import Bounds, PositionRule

MASKED = -1e9  # added to the scores of masked keys
DEFAULT_MAX_LENGTH = 512
_KEPT_WHOLE = ("scaled_dot_product_attention", "linear", "layer_norm", "gelu", "matmul", "softmax")
_BATCH, _LENGTH = 2, 7  # the example that is traced: sizes of 1 would be taken for constants


def import_module(
    model: nn.Module, name: str | None = None, max_length: int | None = None, tokenizer: str | None = None
) -> Imported:
    """Import an encoder.

    model: a Hugging Face encoder with or without head, or any module whose `forward` takes `input_ids` and
        `attention_mask`, both `(batch, length)`. fp32 weights on the CPU; it is put in evaluation mode while traced.
    max_length: the longest sequence in tokens; by default what the model's configuration allows.

    Raises UnsupportedModelError with the reason.
    """
    _check_module(model)
    training = model.training
    model.eval()
    try:
        positions = _position_rule(model)
        wrapper = _Wrapper(model, positions)
        limit = _max_length(model, positions, max_length)
        mod, weights = _to_relax(wrapper, limit)
        return Imported(
            name=name or type(model).__name__,
            model_type=str(getattr(_config(model), "model_type", type(model).__name__)),
            mod=mod,
            weights=weights,
            output_names=wrapper.output_names(),
            bounds=Bounds(limit, _vocab_size(model), _type_vocab_size(model)),
            positions=positions,
            parameter_count=sum(p.numel() for p in model.parameters()),
            tokenizer=tokenizer,
        )
    finally:
        model.train(training)


class _Wrapper(nn.Module):
    """Fixes a model's inputs to `names`, in order, and its outputs to a tuple of tensors."""

    def __init__(self, model: nn.Module, positions: PositionRule):
        super().__init__()
        self.model = model
        self.encoder = _encoder(model)
        self.positions = positions
        self.names = _input_names(model, positions)
        self._given: dict[str, torch.Tensor] = {}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*inputs).values())

    def named(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's outputs by name."""
        self._given = dict(zip(self.names, inputs, strict=True))
        accepted = {name: self._given[name] for name in self.names if name in _parameters(self.model)}
        accepted.pop("position_ids", None)
        if self.encoder is None:
            return _tensors(self.model(**accepted))
        handle = self.encoder.register_forward_pre_hook(self._complete, with_kwargs=True)
        try:
            return _tensors(self.model(**accepted))
        finally:
            handle.remove()

    def _complete(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give the encoder what it would otherwise compute itself."""
        call = dict(inspect.signature(encoder.forward).bind(*args, **kwargs).arguments)
        call.update(call.pop("kwargs", {}))
        mask = call.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            call["attention_mask"] = (1.0 - mask.to(torch.float32))[:, None, None, :] * MASKED
        for name in ("token_type_ids", "position_ids"):
            if call.get(name) is None and name in self._given:
                call[name] = self._given[name]
        return (), call

    def example(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs for these token ids, all of them real."""
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        if "position_ids" in self.names:
            rows = [position_ids(self.positions, row) for row in ids.numpy()]
            given["position_ids"] = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tuple(given[name] for name in self.names)

    @torch.inference_mode()
    def output_names(self) -> tuple[str, ...]:
        """The names of the model's outputs, in order."""
        return tuple(self.named(*self.example(_sample_ids(self.model))))


def _tensors(output: Any) -> dict[str, torch.Tensor]:
    """A model's output as named tensors; caches and missing parts are left out."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        items = dict(output)
    elif isinstance(output, tuple | list):
        items = {f"output_{i}": value for i, value in enumerate(output)}
    else:
        raise UnsupportedModelError(f"the model returns {type(output).__name__}; a tensor, tuple or mapping is needed")
    return {name: value for name, value in items.items() if isinstance(value, torch.Tensor)}


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
    config = _config(model)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a decoder (model type {config.model_type!r}); only encoders are supported"
        )
    missing = {"input_ids", "attention_mask"} - set(_parameters(model))
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}; "
            "an encoder's forward(input_ids, attention_mask, ...) is needed"
        )


def _parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's inputs."""
    return tuple(inspect.signature(model.forward).parameters)


def _encoder(model: nn.Module) -> nn.Module | None:
    """The Hugging Face model that this is, or the first one inside it."""
    return next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)


def _config(model: nn.Module) -> Any:
    """The configuration of the Hugging Face model that this is or holds."""
    return getattr(_encoder(model), "config", None)


def _input_names(model: nn.Module, positions: PositionRule) -> tuple[str, ...]:
    names = ["input_ids", "attention_mask"]
    if _type_vocab_size(model):
        names.append("token_type_ids")
    if positions.kind != "none":
        names.append("position_ids")
    return tuple(names)


def _type_vocab_size(model: nn.Module) -> int:
    encoder = _encoder(model)
    takes = encoder is not None and "token_type_ids" in _parameters(encoder)
    return int(getattr(_config(model), "type_vocab_size", 0) or 0) if takes else 0


def _vocab_size(model: nn.Module) -> int:
    """How many token ids the model's own embedding has rows for."""
    find: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    table = find() if callable(find) else None
    if not isinstance(table, nn.Embedding):
        table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding (torch.nn.Embedding)")
    return int(table.num_embeddings)


def _sample_ids(model: nn.Module) -> torch.Tensor:
    """Token ids with the pad id, if there is one, in the middle: what the position rules differ in."""
    vocabulary = _vocab_size(model)
    ids = torch.randint(0, vocabulary, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(0))
    pad = getattr(_config(model), "pad_token_id", None)
    if pad is not None and 0 <= int(pad) < vocabulary:
        ids[:, 2] = int(pad)
    return ids


@torch.inference_mode()
def _position_rule(model: nn.Module) -> PositionRule:
    """The rule whose explicit position ids reproduce what the model does without any."""
    encoder = _encoder(model)
    if encoder is None or "position_ids" not in _parameters(encoder):
        return PositionRule()
    ids = _sample_ids(model)
    plain = _Wrapper(model, PositionRule())
    wanted = plain(*plain.example(ids))
    for rule in _candidate_rules(model):
        attempt = _Wrapper(model, rule)
        got = attempt(*attempt.example(ids))
        if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted, strict=True)):
            return rule
    raise UnsupportedModelError(
        f"{type(model).__name__}: no known rule gives the position ids that the model uses; "
        "the rules tried are 0, 1, 2, ... and RoBERTa's count of tokens that are not padding"
    )


def _candidate_rules(model: nn.Module) -> list[PositionRule]:
    rules = [PositionRule("arange", 0)]
    pad = getattr(_config(model), "pad_token_id", None)
    if pad is not None:
        rules.append(PositionRule("count_non_pad", int(pad), int(pad)))
        rules.append(PositionRule("count_non_pad", 1, 1))  # MPNet's padding index, whatever its pad token
    return rules


def _max_length(model: nn.Module, positions: PositionRule, asked: int | None) -> int:
    table = getattr(_config(model), "max_position_embeddings", None)
    offset = positions.offset + 1 if positions.kind == "count_non_pad" else positions.offset
    limit = int(table) - offset if table else None
    if asked is None:
        return limit or DEFAULT_MAX_LENGTH
    if asked < 1 or (limit is not None and asked > limit):
        raise UnsupportedModelError(
            f"max_length={asked} is not possible: the model has positions for 1 to {limit} tokens"
        )
    return asked


def _to_relax(wrapper: _Wrapper, max_length: int) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
    try:
        program = _export(wrapper, max_length)
        mod = from_exported_program(
            program, keep_params_as_input=True, unwrap_unit_return_tuple=True, run_ep_decomposition=False
        )
    except Exception as error:
        raise UnsupportedModelError(f"{type(wrapper.model).__name__} cannot be imported: {summary(error)}") from error
    mod, params = relax.frontend.detach_params(mod)
    return _name_inputs(mod, wrapper.names), list(params["main"])


def _export(wrapper: _Wrapper, max_length: int) -> torch.export.ExportedProgram:
    example = wrapper.example(_sample_ids(wrapper.model))
    batch = torch.export.Dim("batch", min=1, max=4096)
    length = torch.export.Dim("length", min=1, max=max_length)
    shapes = (tuple({0: batch, 1: length} for _ in example),)
    table = torch.export.default_decompositions()
    for op in list(table):
        if str(op).split(".")[1] in _KEPT_WHOLE:  # "aten.linear.default"
            table.pop(op)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(wrapper, example, dynamic_shapes=shapes).run_decompositions(table)


def _name_inputs(mod: ir.IRModule, names: tuple[str, ...]) -> ir.IRModule:
    """Give `main`'s inputs their names, and its weights theirs without the exporter's prefix."""
    func = mod["main"]
    weights = [p.name.removeprefix("p_").removeprefix("model_") for p in func.params[len(names) :]]
    params = [relax.Var(name, p.ty) for name, p in zip([*names, *weights], func.params, strict=True)]
    new: dict[relax.Var, relax.Expr] = dict(zip(func.params, params, strict=True))
    builder = builder_without_main(mod)
    with builder.function("main", params, attrs={"num_input": len(names)}):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    new[binding.var] = builder.emit(substitute(binding.value, new))
            out = builder.emit_output(substitute(func.body.body, new))
        builder.emit_func_output(out)
    return builder.finalize()
