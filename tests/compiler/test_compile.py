"""`turbo_tvm.compile`: what it makes, and what it refuses before and after work."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
import transformers
import tvm

import turbo_tvm
from turbo_tvm.compiler import compile as compiler
from turbo_tvm.errors import CompileError, TargetError, TurboError, UnsupportedModelError
from turbo_tvm.frontends.torch.operators import CONVERTERS

TINY = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def bert(served) -> torch.nn.Module:
    return copy.deepcopy(served("bert").module)


def refuse(error: type[TurboError], message: str, model: object, **options: object) -> None:
    with pytest.raises(error, match=message):
        turbo_tvm.compile(model, progress=False, **options)


class TestManifest:
    def test_says_what_was_compiled(self, served):
        pair = served("bert")
        manifest = pair.compiled.manifest
        assert (manifest.name, manifest.model_type, manifest.precision) == ("BertModel", "bert", "fp32")
        assert (manifest.turbo_version, manifest.tvm_version) == (turbo_tvm.__version__, tvm.__version__)
        assert manifest.layout == "packed" and not manifest.declined
        assert (
            manifest.request_limits.max_length,
            manifest.request_limits.vocab_size,
            manifest.request_limits.type_vocab_size,
        ) == (64, 101, 2)
        assert manifest.source_parameters == sum(p.numel() for p in pair.module.parameters())
        assert manifest.target.features and manifest.kernels and manifest.parameters and manifest.buffers
        assert repr(pair.compiled).startswith("<CompiledModel BertModel fp32 for cpu (")

    def test_a_model_that_is_not_recognised_says_why(self, served):
        manifest = served("padded").compiled.manifest
        assert manifest.layout == "padded"
        assert manifest.declined[0].startswith("padding was not removed: ")

    @pytest.mark.parametrize(
        ("name", "primary"),
        [("bert", "last_hidden_state"), ("mean", "sentence_embedding"), ("answers", None)],
    )
    def test_main_output(self, served, name, primary):
        assert served(name).compiled.manifest.primary == primary


def test_the_module_is_left_as_it_was(bert):
    bert.train()
    bert.encoder.eval()
    before = [part.training for part in bert.modules()]
    compiled = turbo_tvm.compile(bert, max_length=1, progress=False)  # shorter than the example that is traced
    assert [part.training for part in bert.modules()] == before
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in bert.modules())
    assert compiled.run([[5], [6]])[1].shape == (1, 32)
    with pytest.raises(TurboError, match="the model allows 1"):
        compiled.run([[5, 6]])


class TestModelsThatAreRefused:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, bert, dtype):
        refuse(
            UnsupportedModelError, rf"weights are {dtype}; only torch.float32 .* call model.float\(\)", bert.to(dtype)
        )

    @pytest.mark.parametrize("cache", [False, True])
    def test_decoders_without_saying_so(self, cache):
        """GPT-2's own mask is causal; an encoder's mask in its place would be silently wrong."""
        config = transformers.GPT2Config(
            vocab_size=101,
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=64,
            use_cache=cache,
            bos_token_id=0,
            eos_token_id=1,
        )
        refuse(UnsupportedModelError, "GPT2Model attends otherwise than an encoder", transformers.GPT2Model(config))

    def test_decoders_and_encoder_decoders(self):
        t5 = transformers.T5Config(vocab_size=101, d_model=32, num_layers=1, num_heads=2, d_ff=64, d_kv=16)
        refuse(UnsupportedModelError, r"T5Model is a decoder \(model type 't5'\)", transformers.T5Model(t5))
        bert = transformers.BertConfig(**TINY, is_decoder=True)
        refuse(UnsupportedModelError, "is a decoder", transformers.BertLMHeadModel(bert))

    def test_a_graph_that_is_imported_wrongly(self, monkeypatch):
        """TVM's own importer makes another model of T5's encoder; nobody must get its answers."""
        monkeypatch.delitem(CONVERTERS, "scaled_dot_product_attention.default")
        t5 = transformers.T5Config(vocab_size=101, d_model=32, num_layers=1, num_heads=2, d_ff=64, d_kv=16)
        message = (
            "T5EncoderModel is not supported: compiled, its output 'last_hidden_state' differs from the original's"
        )
        refuse(UnsupportedModelError, message, transformers.T5EncoderModel(t5))

    def test_a_model_that_is_another_one_for_long_sequences(self):
        """BigBird attends in blocks from a number of tokens on, and to all tokens below."""
        sizes = TINY | {"max_position_embeddings": 128, "num_hidden_layers": 1}
        blocks = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
        message = (
            "BigBirdModel is not supported: compiled, its output .* differs .* for 1 sequence.s. of at most 128 tokens"
        )
        refuse(UnsupportedModelError, message, transformers.BigBirdModel(transformers.BigBirdConfig(**sizes, **blocks)))

    @pytest.mark.parametrize("model", [None, 5, transformers.BertModel])
    def test_not_a_module(self, model):
        refuse(UnsupportedModelError, "a torch.nn.Module is needed, not", model)

    def test_images_and_text_at_once(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 101}, vision_config=sizes)
        message = "CLIPModel takes images and text at once; .*: compile model.text_model and model.vision_model instead"
        refuse(UnsupportedModelError, message, transformers.CLIPModel(config))

    def test_images_that_do_not_become_patches(self, bert):
        class Overlapping(torch.nn.Module):
            def __init__(self, stem):
                super().__init__()
                self.stem = stem

            def forward(self, pixel_values):
                return self.stem(pixel_values)

        overlapping = Overlapping(torch.nn.Conv2d(3, 8, 4, 2))
        refuse(UnsupportedModelError, "Overlapping does not begin with patches", overlapping, image_size=16)
        refuse(UnsupportedModelError, "Overlapping says no image size: give image_size=", overlapping)
        refuse(UnsupportedModelError, "cannot be run on pixel_values of 2 x 3 alone", overlapping, image_size=(2, 3))
        refuse(UnsupportedModelError, r"in pixels, or one number for both, not \(16,\)", overlapping, image_size=(16,))
        refuse(UnsupportedModelError, "max_length=9 is for models of text", overlapping, max_length=9)
        refuse(UnsupportedModelError, "has no convolution", Overlapping(torch.nn.Linear(3, 3)), image_size=16)
        refuse(
            UnsupportedModelError, "image_size=16 is for models of images; BertModel is not one", bert, image_size=16
        )

    def test_inputs_of_another_kind(self):
        refuse(
            UnsupportedModelError,
            "Linear.forward takes no attention_mask and no input_ids",
            torch.nn.Linear(3, 3),
        )

    def test_a_module_that_fails(self):
        class Broken(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(9, 8)

            def forward(self, input_ids, attention_mask):
                raise KeyError("labels")

        refuse(UnsupportedModelError, "Broken cannot be run on input_ids and attention_mask alone: 'labels'", Broken())

    def test_not_on_the_cpu(self, bert):
        refuse(UnsupportedModelError, r"not on the CPU: call model.cpu\(\) first", bert.to("meta"))

    def test_paths(self, tmp_path):
        refuse(UnsupportedModelError, "there is no model at", tmp_path / "missing")
        (tmp_path / "weights.bin").write_bytes(b"")
        refuse(UnsupportedModelError, "is a file; an ONNX file .* or a model folder", tmp_path / "weights.bin")
        refuse(UnsupportedModelError, "there is no model at", tmp_path / "model.onnx")

    @pytest.mark.parametrize("longest", [0, -1, 65])
    def test_length(self, bert, longest):
        refuse(
            UnsupportedModelError, f"max_length={longest} is not possible: .* 1 to 64 tokens", bert, max_length=longest
        )


class TestOptionsThatAreRefused:
    def test_before_any_work(self, monkeypatch, bert, tmp_path):
        monkeypatch.setattr(compiler, "import_model", lambda *_: pytest.fail("it began"))
        refuse(TargetError, "precision 'int8' is not supported; use one of fp32, bf16", bert, precision="int8")
        refuse(TargetError, "precision None is not supported", bert, precision=None)
        refuse(TargetError, "unknown target 'gpu'", bert, target="gpu")
        refuse(TurboError, "the number of threads must be a whole number", bert, threads=0)

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
    def test_a_precision_that_the_target_has_not(self, monkeypatch, bert):
        monkeypatch.setattr(compiler, "import_model", lambda *_: pytest.fail("it began"))
        message = "precision 'bf16' needs a CPU with AVX512-BF16, which x86-64-v4 lacks: compile with precision='fp32'"
        refuse(TargetError, message, bert, precision="bf16", target="cpu:x86-64-v4")

    @pytest.mark.parametrize("found", [{"PATH": ""}, {"CXX": "/nowhere/c++"}])
    def test_no_compiler(self, monkeypatch, bert, found):
        monkeypatch.delenv("CXX", raising=False)
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(compiler, "import_model", lambda *_: pytest.fail("it began"))
        refuse(CompileError, r"no C\+\+ compiler was found to link the code: install g\+\+ or clang", bert)

    def test_a_compiler_that_fails(self, monkeypatch, served, bert):
        monkeypatch.setenv("CXX", "false")
        monkeypatch.setattr(compiler, "import_model", lambda *_: served("bert").imported())
        refuse(CompileError, "linking the code failed", bert)

    @pytest.mark.parametrize("text", [None, b"\xff\xfe\x00", b"{}", b"[", b""])
    def test_tokenizer(self, bert, tmp_path, text):
        path = tmp_path / "tokenizer.json"
        if text is not None:
            path.write_bytes(text)
        refuse(UnsupportedModelError, "the tokenizer .* cannot be used", bert, tokenizer=path)
