"""A compiled model's face: its call against PyTorch, its results, and what it refuses."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest
import torch

import turbo_tvm
from turbo_tvm.errors import ArtifactError, InputError, TurboError
from turbo_tvm.runtime.model import ModelOutput

NAMES = ["bert", "roberta", "mpnet", "mean", "answers", "padded"]
LENGTHS = [13, 1, 7, 12, 2]
WIDTH = 13


def padded_batch(side: str, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids (5, 13) and a mask: padding on the right, on the left, or holes as well."""
    ids = torch.randint(4, 101, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(WIDTH) < length for length in LENGTHS]).long()
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[0, 3:6] = mask[3, 5] = 0
    return torch.where(mask.bool(), ids, pad_id), mask


def pad_id_of(module: torch.nn.Module) -> int:
    return next(m.config.pad_token_id for m in module.modules() if hasattr(m, "config"))


@torch.inference_mode()
def reference(module: torch.nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module(**inputs).items() if isinstance(value, torch.Tensor)}


def assert_agree(got: ModelOutput, wanted: dict[str, torch.Tensor], mask: torch.Tensor, per_token: set[str]) -> None:
    """Equal under the mask, and 0 elsewhere."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].shape == value.shape and got[name].dtype == torch.float32
        expected = value
        if name in per_token:
            expected = value * mask.reshape(*mask.shape, *[1] * (value.dim() - 2))
            assert (got[name][mask == 0] == 0).all()
        assert (got[name] - expected).abs().max() < 1e-4, name


def per_token(model: turbo_tvm.CompiledModel) -> set[str]:
    return {spec.name for spec in model.manifest.outputs if spec.kind == "token"}


def arrays(results: list[Any]) -> list[np.ndarray]:
    return [a for result in results for a in (result.values() if isinstance(result, dict) else [result])]


class TestCall:
    @pytest.mark.parametrize("name", NAMES)
    def test_right_padding_agrees_with_pytorch(self, served, name):
        pair = served(name)
        ids, mask = padded_batch("right", pad_id_of(pair.module))
        wanted = reference(pair.module, input_ids=ids, attention_mask=mask)
        assert_agree(pair.compiled(ids, mask), wanted, mask, per_token(pair.compiled))

    @pytest.mark.parametrize("side", ["left", "holes"])
    @pytest.mark.parametrize("name", NAMES)
    def test_other_padding_agrees_with_pytorch_or_is_refused(self, served, name, side):
        pair = served(name)
        ids, mask = padded_batch(side, pad_id_of(pair.module))
        refused = {"left": {"bert", "padded"}, "holes": {"mpnet", "padded"}}[side]
        if name in refused:
            why = {"left": "hides its first token", "holes": "has holes"}[side]
            with pytest.raises(InputError, match=rf"the attention_mask of sequence \d+ {why}"):
                pair.compiled(ids, mask)
            return
        wanted = reference(pair.module, input_ids=ids, attention_mask=mask)
        assert_agree(pair.compiled(ids, mask), wanted, mask, per_token(pair.compiled))

    @pytest.mark.parametrize("name", NAMES)
    def test_without_mask_every_token_is_real(self, served, name):
        pair = served(name)
        ids, mask = padded_batch("right", pad_id_of(pair.module))
        ones = torch.ones_like(mask)
        assert_agree(
            pair.compiled(ids),
            reference(pair.module, input_ids=ids, attention_mask=ones),
            ones,
            per_token(pair.compiled),
        )

    @pytest.mark.parametrize("name", ["bert", "answers"])
    def test_token_types(self, served, name):
        pair = served(name)
        ids, mask = padded_batch("right", 0)
        types = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(4))
        wanted = reference(pair.module, input_ids=ids, attention_mask=mask, token_type_ids=types)
        assert_agree(pair.compiled(ids, mask, types), wanted, mask, per_token(pair.compiled))
        plain = reference(pair.module, input_ids=ids, attention_mask=mask)
        assert any((wanted[key] - plain[key]).abs().max() > 1e-3 for key in wanted)

    @pytest.mark.parametrize(
        "convert",
        [
            lambda ids, mask: (ids.int(), mask.int()),
            lambda ids, mask: (ids, mask.bool()),
            lambda ids, mask: (ids, mask.float()),
            lambda ids, mask: (ids.T.contiguous().T, mask.T.contiguous().T),
            lambda ids, mask: (ids.repeat(1, 2)[:, :WIDTH], mask),
            lambda ids, mask: (ids.numpy(), mask.numpy()),
            lambda ids, mask: (ids.numpy().astype("uint8"), mask.numpy().astype(bool)),
            lambda ids, mask: (ids.tolist(), mask.tolist()),
        ],
        ids=["int32", "bool mask", "float mask", "transposed", "strided", "numpy", "uint8", "lists"],
    )
    def test_every_form_of_the_same_input_gives_the_same(self, served, convert):
        compiled = served("bert").compiled
        ids, mask = padded_batch("right", 0)
        wanted = compiled(ids, mask)
        inputs = convert(ids, mask)
        got = compiled(*inputs)
        assert {type(value) for value in got.values()} == {
            type(inputs[0]) if torch.is_tensor(inputs[0]) else np.ndarray
        }
        for name in wanted:
            np.testing.assert_array_equal(np.asarray(got[name]), wanted[name].numpy())

    @pytest.mark.parametrize("options", [{}, {"return_dict": True}, {"output_attentions": False, "head_mask": None}])
    def test_outputs_by_name_attribute_and_place(self, served, options):
        out = served("bert").compiled(torch.tensor([[5, 6, 7]]), **options)
        assert out[0] is out.last_hidden_state is out["last_hidden_state"]
        assert out[1] is out.pooler_output and out[:2][1] is out[1]
        with pytest.raises(AttributeError, match="no output 'logits'; it has last_hidden_state, pooler_output"):
            _ = out.logits

    @pytest.mark.parametrize(
        ("inputs", "options", "message"),
        [
            (([5, 6],), {}, r"input_ids has shape \(2,\); a \(batch, length\) matrix is needed"),
            ((np.zeros((0, 3), int),), {}, r"input_ids is empty: shape \(0, 3\)"),
            ((np.zeros((2, 0), int),), {}, r"input_ids is empty: shape \(2, 0\)"),
            ((np.ones((1, 65), int),), {}, "the matrix is 65 tokens wide; the model allows 64"),
            ((np.ones((1, 3)),), {}, "input_ids holds float64 values"),
            (([[5, 6]], [[1]]), {}, r"attention_mask has shape \(1, 1\), input_ids \(1, 2\)"),
            (([[5, 6]], [[0.0, -1e9]]), {}, "values other than 0 and 1"),
            (([[5, 6]], [[0, 0]]), {}, "sequence 0 is empty: its attention_mask is all zeros"),
            (([[5, 6]], None, [[0]]), {}, r"token_type_ids has shape \(1, 1\)"),
            (([[5, 6]],), {"return_dict": False}, "return_dict=False is not supported"),
            (([[5, 6]],), {"output_attentions": True}, "takes no output_attentions"),
            (([[5, 6]],), {"position_ids": torch.tensor([[0, 1]])}, "takes no position_ids"),
            ((torch.ones(1, 2, device="meta"),), {}, "the tensor is on meta; .* call .cpu"),
            ((torch.ones(1, 2).bfloat16(),), {}, "a torch.bfloat16 tensor holds no token ids or mask"),
        ],
    )
    def test_what_is_refused(self, served, inputs, options, message):
        with pytest.raises(InputError, match=message):
            served("bert").compiled(*inputs, **options)


class TestRun:
    @pytest.mark.parametrize("name", NAMES)
    def test_results_stay_when_the_next_call_runs(self, served, name, random_requests):
        compiled = served(name).compiled
        requests = random_requests(6)
        for output in [None, *(spec.name for spec in compiled.manifest.outputs)]:
            results = compiled.run(requests[0], output=output)
            kept = [a.copy() for a in arrays(results)]
            for request in requests[1:]:
                compiled.run(request, output=output)
            for now, then in zip(arrays(results), kept, strict=True):
                np.testing.assert_array_equal(now, then)
                assert now.flags.writeable and now.dtype == np.float32

    @pytest.mark.parametrize("name", NAMES)
    def test_a_sequence_alone_and_in_a_batch(self, served, name, random_requests):
        compiled = served(name).compiled
        for request in random_requests(4, seed=1):
            together = compiled.run(request)
            for sequence, result in zip(request, together, strict=True):
                for one, other in zip(arrays(compiled.run([sequence])), arrays([result]), strict=True):
                    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)

    def test_shapes_of_every_kind_of_output(self, served):
        bert, answers = served("bert").compiled, served("answers").compiled
        requests = [[5], [6, 7, 8]]
        assert [a.shape for a in bert.run(requests)] == [(1, 32), (3, 32)]
        assert [a.shape for a in bert.run(requests, output="pooler_output")] == [(32,), (32,)]
        assert [a.shape for a in answers.run(requests, output="end_logits")] == [(1,), (3,)]
        # two main outputs: both are given
        assert [list(result) for result in answers.run(requests)] == [["start_logits", "end_logits"]] * 2

    def test_long_lists_run_in_groups(self, served, random_requests, monkeypatch):
        compiled = served("bert").compiled
        request = [s for r in random_requests(5) for s in r]
        wanted = compiled.run(request)
        for limit in (1, 64, 100):
            monkeypatch.setattr(compiled, "max_batch_tokens", limit)
            for got, want in zip(compiled.run(request), wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ([], "the request is empty"),
            ([[5], []], "sequence 1 is empty"),
            ([[5] * 65], "sequence 0 has 65 tokens; the model allows 64: truncate it first"),
            ([[5], [101]], r"sequence 1: token id 101 is out of range: the model's vocabulary has 101 entries"),
            ([[-1]], "token id -1 is out of range"),
            ("text", "a list of token id sequences is needed, not str"),
            (["text"], "token ids are integers"),
            ([[1.5]], "holds float64 values"),
            ([[[1]]], r"sequence 0 has shape \(1, 1\)"),
            ([[2**70]], "sequence 0 holds object values"),
        ],
    )
    def test_what_is_refused(self, served, request_, message):
        with pytest.raises(InputError, match=message):
            served("bert").compiled.run(request_)

    @pytest.mark.parametrize(
        ("types", "message"),
        [
            (5, "must be a list with one entry per sequence, not int"),
            ([[0]], "there are 1 token_type_ids for 2 sequences"),
            ([[0], [0]], r"token_type_ids 0 has shape \(1,\), its sequence \(2,\)"),
            ([[0, 2], [0]], "type 2 is out of range"),
            ([[0, 2**40], [0]], "is out of range"),
        ],
    )
    def test_token_types_that_are_refused(self, served, types, message):
        with pytest.raises(InputError, match=message):
            served("bert").compiled.run([[5, 6], [7]], token_type_ids=types)

    def test_unknown_output(self, served):
        with pytest.raises(InputError, match="no output 'logits'; it has last_hidden_state, pooler_output"):
            served("bert").compiled.run([[5]], output="logits")

    def test_a_refused_request_runs_nothing_and_harms_nothing(self, served, monkeypatch):
        compiled = served("bert").compiled
        before = compiled.run([[5, 6, 7]])
        with monkeypatch.context() as patch, pytest.raises(InputError):
            patch.setattr(compiled._executor, "run", lambda _: pytest.fail("it ran"))
            compiled.run([[5, 6, 7], [101]])
        np.testing.assert_array_equal(compiled.run([[5, 6, 7]])[0], before[0])


class TestSave:
    def test_saved_and_loaded_answers_the_same(self, served, tmp_path, random_requests):
        for name in ("answers", "padded"):
            compiled = served(name).compiled
            compiled.save(tmp_path / "model.turbo")
            loaded = turbo_tvm.load(tmp_path / "model.turbo")
            for request in random_requests(3):
                for one, other in zip(arrays(loaded.run(request)), arrays(compiled.run(request)), strict=True):
                    np.testing.assert_array_equal(one, other)

    def test_disk_full(self, served, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="the disk is full: free some space or save elsewhere"):
            served("bert").compiled.save(tmp_path / "model.turbo")
        assert not list(tmp_path.iterdir())

    def test_a_device_is_not_replaced(self, served, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with pytest.raises(ArtifactError, match="it is a device: choose the path of a file"):
            served("bert").compiled.save(pipe)
        assert pipe.is_fifo()

    def test_without_tokenizer_encode_says_what_to_do(self, served):
        with pytest.raises(TurboError, match=r"BertModel carries no tokenizer: call run\(\) with token ids"):
            served("bert").compiled.encode(["text"])
