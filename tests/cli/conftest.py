"""Artifacts for the tests of the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import turbo_tvm
from turbo_tvm import config
from turbo_tvm.artifact import file as artifact
from turbo_tvm.artifact.cost_spec import CostSpec
from turbo_tvm.runtime.device.cpu_features import machine_name


@pytest.fixture(scope="session")
def cost_spec() -> CostSpec:
    return CostSpec("packed", terms=(1e-3, 1e-5, 1e-8, 5e-5), error=0.03, points=9)


@pytest.fixture(autouse=True)
def whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` and `compile` set up their whole process; this one has other tests to run."""
    monkeypatch.setattr(config, "quiet_model_loading", lambda: None)


@pytest.fixture(scope="session")
def loaded(tiny_artifact: Path) -> turbo_tvm.CompiledModel:
    return turbo_tvm.load(tiny_artifact)


@pytest.fixture(scope="session")
def without_tokenizer(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = artifact.read(tiny_artifact)
    path = tmp_path_factory.mktemp("artifacts") / "no_tokenizer.turbo"
    artifact.write(path, replace(opened.manifest, members={}), opened.library, opened.weights)
    return path


@pytest.fixture(scope="session")
def for_another_machine(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = artifact.read(tiny_artifact)
    arch = "aarch64" if opened.manifest.target.triple_arch == "x86_64" else "x86_64"
    target = replace(opened.manifest.target, name="cpu:other", triple_arch=arch, features=())
    path = tmp_path_factory.mktemp("artifacts") / "other.turbo"
    manifest = replace(opened.manifest, target=target, members={}, declined=("[red]odd\x1b[0m reason[/]",))
    artifact.write(path, manifest, b"this is not code", opened.weights)
    return path


@pytest.fixture
def priced(tiny_artifact: Path, tmp_path: Path, cost_spec: CostSpec) -> Path:
    """An artifact that holds the cost of a model with one thread."""
    path = tmp_path / "tiny.turbo"
    a = artifact.read(tiny_artifact)
    manifest = replace(a.manifest, costs={machine_name(1): cost_spec, "another": cost_spec})
    artifact.write(path, manifest, a.library, a.weights, a.tokenizer)
    return path
