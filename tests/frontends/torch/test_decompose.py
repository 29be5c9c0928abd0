"""Programs that stay as they were exported mean the same as when they are taken apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
import tvm_ffi

from turbo_tvm.compiler import pipeline
from turbo_tvm.frontends.torch import decompose as module
from turbo_tvm.frontends.torch.decompose import decompose
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.schedules.cpu.tiles import CpuTiles

TILES = CpuTiles(16, 4, 3, 32)
SIZES = {"vocab_size": 101, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 1, "max_position_embeddings": 64}

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta with a head": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SIZES, pad_token_id=1)
    ),
    "electra with a head": lambda: transformers.ElectraForMaskedLM(
        transformers.ElectraConfig(**SIZES, embedding_size=16)
    ),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_heads=2, hidden_dim=64, n_layers=1, vocab_size=101)
    ),
}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if "head" not in name else []) for name in MODELS]


@pytest.fixture
def taken_apart(monkeypatch: pytest.MonkeyPatch) -> list[torch.export.ExportedProgram]:
    """The programs that PyTorch took apart in this test."""
    programs: list[torch.export.ExportedProgram] = []
    original = torch.export.ExportedProgram.run_decompositions

    def record(program, table):
        programs.append(program)
        return original(program, table)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", record)
    return programs


@pytest.mark.parametrize("name", NAMES)
def test_models_like_bert_stay_as_they_were_exported_and_are_compiled_to_the_same(name, taken_apart, monkeypatch):
    model = MODELS[name]().eval()
    kept = import_module(model)
    assert not taken_apart
    monkeypatch.setattr(module, "_is_readable", lambda node: False)
    apart = import_module(model)
    assert len(taken_apart) == 1
    first, second = (pipeline.optimize(made.mod, TILES, 64) for made in (kept, apart))
    assert first.layout == second.layout == "packed"
    assert tvm_ffi.structural_equal(first.mod, second.mod, map_free_vars=True)
    assert first.kernels == second.kernels


def export(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.export.ExportedProgram:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    with torch.no_grad():
        return torch.export.export(Model().eval(), (x,))


FLOATS, WHOLE = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: torch.nn.functional.dropout(x, 0.1, training=False), FLOATS),
        (lambda x: 1.0 - x, FLOATS),
        (lambda x: x.to(torch.float32), WHOLE),
        (lambda x: x.transpose(-1, 0).reshape(-1), FLOATS),
    ],
    ids=["no dropout", "one less x", "cast", "transposed"],
)
def test_operators_that_the_importer_reads_as_they_are(function, x):
    program = export(function, x)
    assert decompose(program) is program


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: torch.nn.functional.dropout(x, 0.1, training=True), FLOATS),
        (lambda x: torch.rsub(x, 1.0, alpha=2.0), FLOATS),
        (lambda x: 1 - x, WHOLE),
        (lambda x: x.to(torch.float32, False, True), WHOLE),
        (lambda x: x.to(torch.float32, copy=True), WHOLE),
        (lambda x: x.clone().add_(1.0), FLOATS),
        (lambda x: torch.nn.functional.silu(x), FLOATS),
    ],
    ids=["dropout", "less twice x", "whole numbers", "cast and more", "cast and copy", "in place", "another operator"],
)
def test_what_it_would_misread_or_does_not_know_is_taken_apart(function, x, taken_apart):
    program = export(function, x)
    assert decompose(program) is not program
    assert len(taken_apart) == 1
