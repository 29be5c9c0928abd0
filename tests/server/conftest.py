"""Servers for these tests: real tiny models with tokenizers, and one that computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running_server import FakeEmbedder, Running, running
from shared import Shared
from tiny_text_models import classifier_folder, embedder_folder

import turbo_tvm

LABELS = ("cats", "dogs", "neither")
TEXTS = ["the cat sat on a mat", "a dog ran", "fast", "red blue red blue the the slow park"]


@pytest.fixture(scope="session")
def artifacts(shared: Shared) -> dict[str, Path]:
    """An embedding model, a classifier of LABELS and a reranker, tiny and random, compiled once per run."""
    folder = shared.made("models of the server", _compile_all)
    return {name: folder / f"{name}.turbo" for name in ("embedder", "classifier", "reranker")}


def _compile_all(folder: Path) -> None:
    for name, source in {
        "embedder": embedder_folder(folder / "embedder"),
        "classifier": classifier_folder(folder / "classifier", 3, LABELS),
        "reranker": classifier_folder(folder / "reranker", labels=1),
    }.items():
        model = turbo_tvm.compile(source, progress=False)
        model.measure_cost(budget_s=0.3)
        model.save(folder / f"{name}.turbo")


@pytest.fixture(scope="session")
def real(artifacts: dict[str, Path]) -> Iterator[Running]:
    """A server of the three; the embedder is the first."""
    with running(list(artifacts.values()), threads=1) as server:
        yield server


@pytest.fixture
def fake() -> FakeEmbedder:
    """A model that computes nothing."""
    return FakeEmbedder()


@pytest.fixture(scope="session")
def local(artifacts: dict[str, Path]) -> turbo_tvm.CompiledModel:
    """The embedder without a server."""
    return turbo_tvm.load(artifacts["embedder"], threads=1)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts of different lengths."""
    return TEXTS


@pytest.fixture(scope="session")
def wanted(local: turbo_tvm.CompiledModel) -> np.ndarray:
    """The embeddings of the texts, float32 (texts, columns)."""
    return np.stack(local.encode(TEXTS))
