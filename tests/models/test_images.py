"""Models of images and CLIP's text encoder against PyTorch: whole, through the engine and at the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from cli_runner import fail, succeed
from memory_check import dead_memory_is_nan

import turbo_tvm
from turbo_tvm.compiler import targets
from turbo_tvm.errors import InputError, TargetError

AGREEMENT = 1e-4
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 16}


def noise(count: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from their initial values that a wrong one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.inference_mode()
def agree(module, compiled, pixels, tolerance=AGREEMENT, **options) -> None:
    wanted = {name: v for name, v in module(pixel_values=pixels, **options).items() if isinstance(v, torch.Tensor)}
    got = compiled(pixel_values=pixels)
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].shape == value.shape and got[name].dtype == torch.float32
        assert (got[name] - value).abs().max() < tolerance * max(1, value.abs().max()), name


class TestViT:
    def test_batches_agree_with_pytorch_and_with_each_image_alone(self, served):
        module, compiled = (vit := served("vit")).module, vit.compiled
        assert compiled.manifest.layout == "packed" and not compiled.manifest.declined
        assert compiled.manifest.request_limits.image.tokens == compiled.manifest.request_limits.max_length == 25
        for count in (1, 2, 33):
            agree(module, compiled, noise(count))
        images = list(noise(9).numpy())
        for image, got in zip(images, compiled.run(images), strict=True):
            np.testing.assert_allclose(got, compiled.run([image])[0], rtol=0, atol=1e-5)

    def test_every_way_to_ask(self, served):
        compiled, pixels = served("vit").compiled, noise(3)
        wanted = compiled.run(pixels)
        for got in (
            compiled(pixels).last_hidden_state,
            compiled(pixel_values=pixels.numpy(), interpolate_pos_encoding=True)[0],
            compiled.answer([compiled.prepare(image) for image in pixels], "last_hidden_state"),
        ):
            np.testing.assert_array_equal(np.stack(list(got)), np.stack(wanted))
        assert isinstance(compiled(pixels.numpy())[0], np.ndarray)

    @pytest.mark.parametrize(
        ("args", "options", "message"),
        [
            ((), {}, "this model takes images"),
            ((noise(1),), {"pixel_values": noise(1)}, "this model takes images"),
            ((noise(1),), {"attention_mask": torch.ones(1, 25)}, "takes no attention_mask"),
            ((noise(1),), {"bool_masked_pos": torch.ones(1, 24)}, "takes no bool_masked_pos"),
            ((noise(1, 32, 32),), {}, "this model takes 3 channels of 32 x 48 pixels"),
            ((torch.tensor([[5, 6]]),), {}, r"image 0 has shape \(2,\)"),
        ],
    )
    def test_calls_that_are_refused(self, served, args, options, message):
        with pytest.raises(InputError, match=message):
            served("vit").compiled(*args, **options)

    def test_a_model_of_text_takes_no_images(self, served):
        compiled = served("clip_text").compiled
        with pytest.raises(InputError, match="takes no pixel_values"):
            compiled(torch.tensor([[5, 6]]), pixel_values=noise(1))
        with pytest.raises(InputError, match="input_ids are missing"):
            compiled()

    def test_memory_is_planned_without_a_trace_in_the_answers(self, served):
        compiled, images = served("vit").compiled, list(noise(5).numpy())
        wanted = compiled.run(images)
        with dead_memory_is_nan(compiled._executor):
            for got, want in zip(compiled.run(images), wanted, strict=True):
                np.testing.assert_array_equal(got, want)

    def test_large_requests_run_in_groups(self, served):
        compiled, images = served("vit").compiled, list(noise(7).numpy())
        wanted = compiled.run(images)
        try:
            compiled.max_batch_tokens = 55
            for got, want in zip(compiled.run(images), wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        finally:
            compiled.max_batch_tokens = turbo_tvm.runtime.model.MAX_BATCH_TOKENS

    def test_the_engine_answers_images(self, served):
        compiled, images = served("vit").compiled, list(noise(12).numpy())
        wanted = compiled.run(images, output="pooler_output")
        with turbo_tvm.Engine(compiled, output="pooler_output", cost=lambda lengths: 1e-4 * len(lengths)) as engine:
            futures = [engine.submit(image) for image in [*images, *images]]
            for future, want in zip(futures, [*wanted, *wanted], strict=True):
                np.testing.assert_allclose(future.result(30), want, rtol=0, atol=1e-5)
            assert engine.statistics.batches >= 1 and engine.infer_sync(images[3]).shape == (32,)
            with pytest.raises(InputError, match="the image has shape"):
                engine.submit(images[0][:2])

    def test_costs_and_profiles(self, served):
        compiled = served("vit").compiled
        assert compiled.measure_cost(budget_s=0.2).points >= 4 and compiled.cost([25, 25]) > 0
        report = compiled.profile([25, 25], rounds=1)
        assert {k.name for k in report.kernels} >= {k.name for k in compiled.manifest.kernels}
        with pytest.raises(InputError, match="an image of this model is 25 tokens, and not 7"):
            compiled.profile([25, 7])

    def test_the_command_line(self, served, tmp_path):
        compiled, pixels = served("vit").compiled, noise(3).numpy()
        compiled.save(tmp_path / "vit.turbo")
        np.save(tmp_path / "images.npy", pixels)
        line = ("run", tmp_path / "vit.turbo", "--input", tmp_path / "images.npy", "--output", "pooler_output")
        found = [json.loads(text) for text in succeed(*line).splitlines()]
        assert [answer["image"] for answer in found] == [[3, 32, 48]] * 3
        wanted = compiled.run(pixels, output="pooler_output")
        np.testing.assert_allclose([answer["outputs"]["pooler_output"] for answer in found], wanted, atol=1e-6)
        assert "image of 3 x 32 x 48" in succeed(*line, "--format", "table")
        assert "images of 3 x 32 x 48 in patches of 8 x 8, 25 tokens" in succeed("inspect", tmp_path / "vit.turbo")
        assert "image 0 has shape (3,)" in fail("run", tmp_path / "vit.turbo", "--ids", "1,2,3")


def test_another_size_with_two_tokens_that_are_pooled():
    config = transformers.DeiTConfig(**SIZES, num_labels=5)
    module = spread(transformers.DeiTForImageClassificationWithTeacher(config))
    compiled = turbo_tvm.compile(module, image_size=(48, 80))
    assert compiled.manifest.layout == "packed" and compiled.manifest.request_limits.image.prefix == 2
    agree(module, compiled, noise(3, 48, 80), interpolate_pos_encoding=True)


def test_the_vision_tower_of_clip():
    module = spread(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SIZES)))
    compiled = turbo_tvm.compile(module)
    assert compiled.manifest.layout == "packed" and compiled.manifest.primary == "image_embeds"
    assert any("quick_gelu" in kernel.name for kernel in compiled.manifest.kernels)
    agree(module, compiled, noise(5, 32, 32))


class Stem(torch.nn.Module):
    """Patches of 8 x 8 behind a class token, and a product; the class token, or the mean of the patches."""

    def __init__(self, mean: bool):
        super().__init__()
        self.mean = mean
        self.patches = torch.nn.Conv2d(3, 32, 8, 8)
        self.first = torch.nn.Parameter(torch.randn(1, 1, 32))
        self.places = torch.nn.Parameter(torch.randn(1, 25, 32))
        self.dense = torch.nn.Linear(32, 32)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(rows.shape[0], -1, -1), rows], 1) + self.places
        hidden = self.dense(torch.nn.functional.gelu(self.dense(tokens)) + tokens)
        return {"last_hidden_state": hidden, "pooled": hidden[:, 1:].mean(1) if self.mean else hidden[:, 0]}


def test_what_no_pass_recognises_is_right_all_the_same():
    module = spread(Stem(mean=True))
    compiled = turbo_tvm.compile(module, image_size=(32, 48))
    assert compiled.manifest.layout == "padded" and compiled.manifest.declined
    agree(module, compiled, noise(3))


def test_patches_in_bf16():
    try:
        targets.check_precision(targets.resolve("cpu"), "bf16")
    except TargetError as error:
        pytest.skip(str(error))
    module = spread(Stem(mean=False))
    compiled = turbo_tvm.compile(module, image_size=(32, 48), precision="bf16")
    assert compiled.manifest.layout == "packed" and any(k.family == "cast_rows" for k in compiled.manifest.kernels)
    agree(module, compiled, noise(5), 0.02)


class TestClipText:
    @torch.inference_mode()
    def test_every_length_agrees_with_pytorch_in_one_batch(self, served):
        module, compiled = (clip := served("clip_text")).module, clip.compiled
        assert compiled.manifest.layout == "packed" and compiled.manifest.primary == "text_embeds"
        rng = np.random.default_rng(0)
        texts = [rng.integers(8, 101, n) for n in (1, 2, 7, 12, 13, 31, 63, 64)]
        for text in texts[2:]:
            text[len(text) // 2] = text[-1] = 7
        for name in ("text_embeds", "last_hidden_state"):
            for text, got in zip(texts, compiled.run(texts, output=name), strict=True):
                wanted = module(input_ids=torch.from_numpy(text)[None])[name][0].numpy()
                np.testing.assert_allclose(got, wanted, rtol=0, atol=AGREEMENT)

    @torch.inference_mode()
    def test_padding(self, served):
        module, compiled = (clip := served("clip_text")).module, clip.compiled
        ids = torch.randint(8, 101, (3, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
        ids[:, 3] = 7
        got, wanted = compiled(ids, mask.long()), module(input_ids=ids, attention_mask=mask.long())
        assert (got.text_embeds[:2] - wanted.text_embeds[:2]).abs().max() < AGREEMENT
        assert (got.last_hidden_state - wanted.last_hidden_state * mask[..., None]).abs().max() < AGREEMENT
