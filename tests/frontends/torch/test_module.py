"""What is found out about a module before it is exported."""

from __future__ import annotations

import pytest
import torch
import transformers

from turbo_tvm.artifact.manifest import PositionRule
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.options import DEFAULTS, ImportOptions
from turbo_tvm.frontends.torch import module

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"max_position_embeddings": 34}


def model(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return getattr(transformers, f"{kind}Model")(config).eval()


def t5() -> torch.nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


@pytest.mark.parametrize(
    ("made", "rule", "longest"),
    [
        (model("Bert"), PositionRule("arange", 0), 34),
        (model("Roberta", pad_token_id=1), PositionRule("count_non_pad", 1, 1), 32),
        (model("Roberta", pad_token_id=5), PositionRule("count_non_pad", 5, 5), 28),
        (model("MPNet", pad_token_id=4), PositionRule("count_non_pad", 1, 1), 32),
        (t5(), PositionRule(), 512),
    ],
    ids=["bert", "roberta", "another pad token", "mpnet", "none"],
)
def test_how_positions_follow_from_token_ids(made, rule, longest):
    assert module._position_rule(made) == rule
    assert module._max_length(made, rule, DEFAULTS) == longest
    for named in (16, 1000):  # by the files of a folder
        wanted = named if rule == PositionRule() else min(named, longest)
        assert module._max_length(made, rule, ImportOptions(usual_length=named)) == wanted


@pytest.mark.parametrize("asked", [0, -1, 35])
def test_lengths_that_the_table_of_positions_lacks(asked):
    with pytest.raises(UnsupportedModelError, match=f"max_length={asked} is not possible: .* for 1 to 34 tokens"):
        module._max_length(model("Bert"), PositionRule("arange", 0), ImportOptions(max_length=asked))


def test_positions_of_no_known_rule():
    backwards = model("Bert")
    backwards.embeddings.register_forward_pre_hook(_backwards, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="no known rule gives the position ids that the model uses"):
        module._position_rule(backwards)


def _backwards(_module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Count positions from the end where none are given."""
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1]).flip(0)[None]
    return args, kwargs


def test_a_module_that_fails_is_in_the_mode_that_it_had():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 8)

        def forward(self, input_ids, attention_mask):
            raise KeyError("labels")

    broken = Broken().train()
    with pytest.raises(UnsupportedModelError, match="cannot be run on input_ids and attention_mask alone: 'labels'"):
        module.import_module(broken)
    assert broken.training and broken.table.training
