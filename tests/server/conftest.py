"""Servers for these tests: real tiny models with tokenizers, and one that computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import FakeEmbedder, Running, running
from tiny_text_models import classifier_folder, embedder_folder

import turbo_tvm

LABELS = ("cats", "dogs", "neither")


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An embedding model, a classifier of LABELS and a reranker, tiny and random, compiled."""
    folder = tmp_path_factory.mktemp("served")
    made = {}
    for name, source in {
        "embedder": embedder_folder(folder / "embedder"),
        "classifier": classifier_folder(folder / "classifier", 3, LABELS),
        "reranker": classifier_folder(folder / "reranker", labels=1),
    }.items():
        made[name] = folder / f"{name}.turbo"
        model = turbo_tvm.compile(source, progress=False)
        model.measure_cost(budget_s=0.3)
        model.save(made[name])
    return made


@pytest.fixture(scope="session")
def real(artifacts: dict[str, Path]) -> Iterator[Running]:
    """A server of the three; the embedder is the first."""
    with running(list(artifacts.values()), threads=1) as server:
        yield server


@pytest.fixture
def fake() -> FakeEmbedder:
    """A model that computes nothing."""
    return FakeEmbedder()
