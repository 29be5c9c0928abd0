"""Encoders beyond BERT's block against PyTorch: RMS norm, gated feed-forwards, rotary positions, windows, shared heads.

Tiny random configurations, one compile each: fp32 over a ragged batch, bf16 for those that need every kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import simulated_gpu
import torch
import transformers

import turbo_tvm
from turbo_tvm.compiler import targets
from turbo_tvm.errors import InputError, TargetError, UnsupportedModelError
from turbo_tvm.frontends.options import ImportOptions
from turbo_tvm.frontends.torch import wrapper as torch_wrapper

VOCABULARY = 211
LENGTHS = (1, 2, 7, 13, 33, 100, 31)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_layers": 2}


def modernbert(**changes) -> transformers.ModernBertConfig:
    """A global layer, then one that sees 5 tokens to either side."""
    layers = {"num_attention_heads": 2, "global_attn_every_n_layers": 2, "local_attention": 10}
    return transformers.ModernBertConfig(**SIZES | TOKENS | layers | {"max_position_embeddings": 120} | changes)


MODELS = {
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(**T5, d_kv=12, num_heads=3, feed_forward_proj="relu")
    ),
    "t5-gated": lambda: transformers.T5EncoderModel(
        transformers.T5Config(**T5, d_kv=32, num_heads=2, feed_forward_proj="gated-gelu")
    ),
    "nomic": lambda: transformers.NomicBertModel(
        transformers.NomicBertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=120)
    ),
    "eurobert": lambda: transformers.EuroBertModel(
        transformers.EuroBertConfig(
            **SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=120,
            mask_token_id=4,
            **{key: TOKENS[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
    ),
    "modernbert": lambda: transformers.ModernBertModel(modernbert()),
}
SLOW = ("t5", "nomic", "eurobert")  # whose parts the others have too
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MODELS]


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from their initial values that a wrong one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@cache
def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return _spread(MODELS[name]())


@pytest.fixture
def compiled(shared) -> Callable[..., turbo_tvm.CompiledModel]:
    """`compiled(name, precision="fp32")`: one of MODELS for up to 120 tokens."""
    options = ImportOptions(max_length=120)

    def get(name: str, precision: str = "fp32") -> turbo_tvm.CompiledModel:
        return shared.compiled(f"modern {name}", lambda: model_of(name), options, precision=precision)

    return get


def sequences(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCABULARY, n) for n in lengths]


@torch.inference_mode()
def reference(model: torch.nn.Module, sequence: np.ndarray, output: str = "last_hidden_state") -> np.ndarray:
    ids = torch.from_numpy(sequence)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))[output][0].numpy()


def agree(model: torch.nn.Module, made: turbo_tvm.CompiledModel, requests, output: str = "last_hidden_state") -> None:
    for sequence, got in zip(requests, made.run(requests, output=output), strict=True):
        np.testing.assert_allclose(got, reference(model, sequence, output), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_length_agrees_with_pytorch_in_one_batch(compiled, name):
    made = compiled(name)
    assert made.manifest.layout == "packed" and not made.manifest.declined
    agree(model_of(name), made, sequences(LENGTHS))
    agree(model_of(name), made, sequences((120,)))


def families(made: turbo_tvm.CompiledModel) -> dict[str, int]:
    """How often each family of kernels is called."""
    counts: dict[str, int] = {}
    for kernel in made.manifest.kernels:
        counts[kernel.family] = counts.get(kernel.family, 0) + kernel.calls
    return counts


@pytest.mark.parametrize(
    ("name", "per_layer", "others"),
    [
        (
            "t5-gated",
            {"norm": 2, "linear": 4, "attention": 1, "gate": 1},
            {"norm": 1},
        ),
        (
            "modernbert",
            {"linear": 4, "attention": 1, "rotary": 1, "gate": 1},
            {"norm": 3},  # the other norms are in products, and in the embedding
        ),
        (
            "eurobert",
            {"norm": 2, "linear": 4, "attention": 1, "rotary": 1, "gate": 1},
            {"norm": 1},
        ),
    ],
)
def test_nothing_is_left_but_our_kernels(compiled, name, per_layer, others):
    wanted = {family: 2 * per_layer.get(family, 0) + others.get(family, 0) for family in {*per_layer, *others}}
    assert families(compiled(name)) == wanted | {"embedding": 1}
    assert len(compiled(name).manifest.steps) == sum(wanted.values()) + 1


def test_a_window_counts_tokens_so_masks_with_holes_are_refused(compiled):
    mask = np.array([[1, 1, 0, 1]])
    with pytest.raises(InputError, match="has holes"):
        compiled("modernbert")(np.full((1, 4), 7), attention_mask=mask)


def test_a_window_and_two_tables_of_angles(compiled):
    names = [k.name for k in compiled("modernbert").manifest.kernels]
    assert [n for n in names if n.startswith("attention")] == [
        "attention_2x16_merged_max120",
        "attention_2x16_merged_max120_window5",
    ]
    tables = [p.name for p in compiled("modernbert").manifest.parameters if p.shape == (120, 16)]
    assert len(tables) == 2


def _lacks_bf16() -> bool:
    try:
        targets.check_precision(targets.resolve("cpu"), "bf16")
    except TargetError:
        return True
    return False


@pytest.mark.skipif(_lacks_bf16(), reason="needs a CPU with AVX512-BF16")
@pytest.mark.parametrize(
    "name",
    ["modernbert", pytest.param("eurobert", marks=pytest.mark.slow)],
)
def test_bf16_points_where_pytorch_does(compiled, name):
    made, requests = compiled(name, "bf16"), sequences(LENGTHS)
    assert all("bf16" in k.name for k in made.manifest.kernels)
    for sequence, got in zip(requests, made.run(requests), strict=True):
        wanted = reference(model_of(name), sequence)
        lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1)
        assert ((got * wanted).sum(-1) / lengths).min() >= 0.9995


@pytest.mark.slow
@pytest.mark.xdist_group("cuda-models")
@pytest.mark.parametrize(("name", "precision", "tolerance"), [("modernbert", "fp16", 0.02), ("eurobert", "bf16", 0.1)])
def test_on_a_gpu(name, precision, tolerance):
    requests = sequences((1, 7, 33, 64, 2))
    with simulated_gpu.machine():
        made = turbo_tvm.compile(model_of(name), target="cuda:sm_80", precision=precision, max_length=120)
        assert made.manifest.layout == "packed"
        found = made.run(requests)
    for sequence, got in zip(requests, found, strict=True):
        wanted = reference(model_of(name), sequence)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.slow
def test_8192_tokens_in_one_request():
    torch.manual_seed(0)
    model = _spread(transformers.ModernBertModel(modernbert(max_position_embeddings=8192)))
    made = turbo_tvm.compile(model)
    assert made.manifest.layout == "packed" and made.manifest.request_limits.max_length == 8192
    agree(model, made, sequences((8192, 70)))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
def test_heads_of_modernbert(head):
    torch.manual_seed(0)
    factory = getattr(transformers, "ModernBert" + head)
    model = _spread(factory(modernbert(num_hidden_layers=1, classifier_pooling="mean")))
    made = turbo_tvm.compile(model)
    assert made.manifest.layout == "packed"
    agree(model, made, sequences((1, 13, 60)), "logits")


def test_a_window_that_the_wrapper_loses_is_noticed(monkeypatch):
    """The sample is longer than the window: inside of it, a model with one is like a model without."""
    monkeypatch.setattr(
        torch_wrapper, "_additive_masks", lambda mask, window, causal: (1.0 - mask.float())[:, None, None] * -1e9
    )
    with pytest.raises(UnsupportedModelError, match=re.escape("ModernBertModel attends otherwise than an encoder")):
        turbo_tvm.compile(model_of("modernbert"))
