"""Tiny encoders in PyTorch, and their ONNX files as PyTorch's two exporters write them."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from shared import Shared

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_LONG = SIZES | {"max_position_embeddings": 66}  # positions start behind the padding's
_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}

FAMILIES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**_LONG, type_vocab_size=1)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=101, max_position_embeddings=64, **_DISTILBERT)
    ),
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**SIZES, embedding_size=16)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**_LONG)),
}

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64, "feed_forward_proj": "gated-gelu"}
_IMAGES = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
_IMAGES |= {"image_size": 32, "patch_size": 8}

# Of these the newer exporter's files are tried alone: they have positions, masks and gates of many kinds.
MODERN = {
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(vocab_size=101, **_T5)),
    "nomic": lambda: transformers.NomicBertModel(transformers.NomicBertConfig(**SIZES)),
    "eurobert": lambda: transformers.EuroBertModel(
        transformers.EuroBertConfig(**SIZES, num_key_value_heads=1, mask_token_id=3, **_IDS)
    ),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SIZES, local_attention=16, cls_token_id=1, sep_token_id=2, **_IDS)
    ),
    "clip text": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**SIZES, pad_token_id=1, bos_token_id=99, eos_token_id=100)
    ),
    "deberta": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            **SIZES, type_vocab_size=0, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
            share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
        )
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**_IMAGES)),
    "clip vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_IMAGES)),
}  # fmt: skip


def build(family: str) -> Any:
    """A model with random weights, biases and norms too."""
    torch.manual_seed(0)
    model = (FAMILIES | MODERN)[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class _Positional(torch.nn.Module):
    """A model called with its inputs in order, and a tuple of its outputs: what the older exporter traces."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(v for v in self.model(**dict(zip(self.names, inputs, strict=True))).values())


def export(
    model: torch.nn.Module,
    path: Path,
    *,
    dynamo: bool,
    opset: int | None = None,
    shape: tuple[int, int] = (2, 7),
    fixed: bool = False,
) -> Path:
    """Write the model's ONNX file: token ids, mask and, if it knows several, token types; or images.

    fixed: for batches of that shape alone.
    """
    ids = torch.randint(5, 101, shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = getattr(model, "config", None)
    if "token_type_ids" in inspect.signature(model.forward).parameters and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if getattr(model, "main_input_name", "") == "pixel_values":
        inputs = {"pixel_values": torch.randn(shape[0], 3, model.config.image_size, model.config.image_size)}
    traced = _Positional(model, tuple(inputs)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
            axes = {0: batch, 1: length} if "input_ids" in inputs else {0: batch}
            shapes = None if fixed else (tuple(axes for _ in inputs),)
            torch.onnx.export(
                traced, tuple(inputs.values()), path, dynamo=True, dynamic_shapes=shapes, opset_version=opset,
                input_names=list(inputs), verbose=False,
            )  # fmt: skip
        else:
            axes = None if fixed else {name: {0: "batch", 1: "length"} for name in inputs}
            torch.onnx.export(
                traced, tuple(inputs.values()), path, dynamo=False, dynamic_axes=axes, opset_version=opset or 14,
                input_names=list(inputs),
            )  # fmt: skip
    return path


def exported(shared: Shared, family: str, *, dynamo: bool) -> tuple[torch.nn.Module, Path]:
    """Return a model and its ONNX file, which is exported once per run."""
    name = f"{'dynamo' if dynamo else 'script'}.onnx"
    place = shared.made(f"{name} of {family}", lambda folder: export(build(family), folder / name, dynamo=dynamo))
    return build(family), place / name
