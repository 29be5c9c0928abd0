"""DeBERTa's relative positions: the table says what the model's own code does."""

from __future__ import annotations

import pytest
import torch
import transformers

from turbo_tvm.frontends.torch.relative_positions import relative_encoder_of, relative_positions_of

SIZES = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "vocab_size": 9,
    "pos_att_type": ["c2p", "p2c"],
}


def deberta_v3(**sizes) -> torch.nn.Module:
    options = {"relative_attention": True, "position_buckets": 256, "max_position_embeddings": 512}
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES | options | sizes))


@pytest.mark.parametrize(
    "model", [deberta_v3(), deberta_v3(position_buckets=-1)], ids=["logarithmic buckets", "every distance its own"]
)
@pytest.mark.parametrize("length", [1, 2, 200, 512])
def test_the_positions_are_those_of_the_model(model, length):
    rows = torch.zeros(2, length, 4)
    assert torch.equal(relative_positions_of(model, 512)(rows), relative_encoder_of(model).get_rel_pos(rows))


def test_only_models_with_relative_attention_get_any():
    assert relative_positions_of(deberta_v3(relative_attention=False), 9) is None
    assert relative_positions_of(transformers.BertModel(transformers.BertConfig(**SIZES)), 9) is None
