"""Models behind fixed inputs: what they are given, and what is read from them."""

from __future__ import annotations

import pytest
import torch
import transformers

from turbo_tvm.artifact.manifest import PositionRule
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.torch import wrapper
from turbo_tvm.frontends.torch.wrapper import FixedInputs
from turbo_tvm.ops.inputs import InputKind

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = (InputKind.TOKEN_IDS, InputKind.ATTENTION_MASK)


def bert(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES | changes)).eval()


def distilbert() -> torch.nn.Module:
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    return transformers.DistilBertModel(config).eval()


class Plain(torch.nn.Module):
    """Nothing of Hugging Face's."""

    def __init__(self, answer=None):
        super().__init__()
        self.table = torch.nn.Embedding(9, 4)
        self.answer = answer

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids) if self.answer is None else self.answer


@pytest.mark.parametrize(
    ("model", "rule", "kinds"),
    [
        (bert(), PositionRule("arange"), (*TEXT, InputKind.TOKEN_TYPE_IDS, InputKind.POSITION_IDS)),
        (bert(), PositionRule(), (*TEXT, InputKind.TOKEN_TYPE_IDS)),
        (distilbert(), PositionRule("arange"), (*TEXT, InputKind.POSITION_IDS)),
        (Plain(), PositionRule(), TEXT),
    ],
    ids=["bert", "bert without positions", "distilbert", "a plain module"],
)
def test_inputs(model, rule, kinds):
    fixed = FixedInputs(model, rule)
    assert fixed.kinds == kinds
    example = fixed.example(torch.tensor([[5, 6, 7]]))
    assert len(example) == len(kinds) and all(x.shape == (1, 3) and x.dtype == torch.int64 for x in example)


def test_position_ids_follow_the_rule():
    fixed = FixedInputs(bert(), PositionRule("count_non_pad", 1, 1))
    given = dict(zip(fixed.kinds, fixed.example(torch.tensor([[5, 1, 7]])), strict=True))
    assert given[InputKind.POSITION_IDS].tolist() == [[2, 1, 3]]
    assert given[InputKind.ATTENTION_MASK].tolist() == [[1, 1, 1]] and not given[InputKind.TOKEN_TYPE_IDS].any()


@torch.inference_mode()
@pytest.mark.parametrize("model", [bert(), distilbert()], ids=["bert", "distilbert"])
def test_answers_are_the_models_own_and_no_hook_is_left(model):
    ids = wrapper.sample_ids(model)
    mask = wrapper.sample_mask(ids)
    fixed = FixedInputs(model, PositionRule("arange"))
    got, wanted = fixed.named(*fixed.example(ids, mask)), model(input_ids=ids, attention_mask=mask)
    assert tuple(got) == fixed.output_names()
    torch.testing.assert_close(got["last_hidden_state"][mask.bool()], wanted.last_hidden_state[mask.bool()])
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_masks_of_keys_of_windows_and_of_later_tokens():
    mask = torch.tensor([[1, 1, 1, 0]])
    plain = wrapper._additive_masks(mask, None, causal=False)
    assert plain.shape == (1, 1, 1, 4) and (plain < 0).tolist() == [[[[False, False, False, True]]]]
    causal = wrapper._additive_masks(mask, None, causal=True)
    assert (causal[0, 0, :3, :3] < 0).tolist() == [[False, True, True], [False, False, True], [False] * 3]
    by_layer = wrapper._additive_masks(mask, 1, causal=False)
    assert torch.equal(by_layer["full_attention"], plain)
    assert (by_layer[wrapper.SLIDING][0, 0, 0] < 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (torch.ones(1), ["output"]),
        ((torch.ones(1), None, torch.ones(1)), ["output_0", "output_2"]),
        ({"hidden": torch.ones(1), "cache": object()}, ["hidden"]),
    ],
)
def test_outputs_by_name(output, names):
    assert list(wrapper.tensors_of(output)) == names


def test_outputs_of_other_kinds():
    with pytest.raises(UnsupportedModelError, match="the model returns str; a tensor, tuple or mapping is needed"):
        wrapper.tensors_of("text")


def test_what_is_read_from_a_model():
    model = bert(pad_token_id=3)
    assert wrapper.encoder_of(model) is model and wrapper.config_of(model) is model.config
    head = transformers.BertForSequenceClassification(model.config)
    assert wrapper.encoder_of(head) is head.bert
    assert (wrapper.vocab_size(head), wrapper.type_vocab_size(head)) == (50, 2)
    assert (wrapper.vocab_size(Plain()), wrapper.type_vocab_size(Plain()), wrapper.config_of(Plain())) == (9, 0, None)
    with pytest.raises(UnsupportedModelError, match="Linear has no token embedding"):
        wrapper.vocab_size(torch.nn.Linear(2, 2))


def test_the_sample_holds_what_rules_differ_in():
    ids = wrapper.sample_ids(bert(pad_token_id=3, eos_token_id=4))
    assert ids.shape == (2, 7) and ids[:, 1:4].tolist() == [[49, 3, 4]] * 2
    mask = wrapper.sample_mask(ids)
    assert mask.sum(1).tolist() == [7, 4]  # what matters is among the first four


def test_the_sample_is_longer_than_a_window():
    config = transformers.ModernBertConfig(
        **SIZES | {"num_hidden_layers": 2},
        local_attention=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    model = transformers.ModernBertModel(config)
    assert wrapper.sliding_window(model) == 5 and wrapper.sample_ids(model).shape == (2, 12)
    assert wrapper.sliding_window(bert()) is None
