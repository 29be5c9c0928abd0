"""Intel AMX from a target's name to the instructions in an artifact, and the permission that loading asks for."""

from __future__ import annotations

import platform
import re
from dataclasses import replace

import pytest
import torch
import transformers

import turbo_tvm
from turbo_tvm.artifact import file as artifact
from turbo_tvm.compiler import targets
from turbo_tvm.errors import TurboError
from turbo_tvm.runtime import loader
from turbo_tvm.runtime.device import library
from turbo_tvm.schedules.cpu import tiles

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's instructions")

# VEX.128.F3.0F38.W0 5C 11:rrr:bbb
TDPBF16PS = re.compile(rb"\xc4\xe2[\x42\x4a\x52\x5a\x62\x6a\x72\x7a]\x5c[\xc0-\xff]")


@pytest.fixture
def compiled(shared):
    """`compiled(target, precision)`: a tiny BERT for that target, with heads of 32 columns, which fit AMX."""

    def get(target: str, precision: str = "bf16") -> turbo_tvm.CompiledModel:
        return shared.compiled("bert for amx", bert, target=target, precision=precision)

    return get


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def kernels(model: turbo_tvm.CompiledModel, family: str) -> list[str]:
    return [k.name for k in model.manifest.kernels if k.family == family]


@pytest.mark.parametrize("name", ["cpu:sapphirerapids", "cpu:graniterapids"])
def test_targets_with_amx(name):
    target = targets.resolve(name)
    assert tiles.cpu_tiles(target) is tiles.AMX
    assert {"amx-tile", "amx-bf16", "avx512bf16"} <= set(targets.describe(name, target).features)


@pytest.mark.parametrize("name", ["cpu:znver4", "cpu:cooperlake", "cpu:icelake-server"])
def test_targets_without(name):
    target = targets.resolve(name)
    assert tiles.cpu_tiles(target) is tiles.AVX512
    assert not [f for f in targets.describe(name, target).features if f.startswith("amx")]


def test_products_of_an_artifact_run_in_tiles(compiled, tmp_path):
    model = compiled("cpu:sapphirerapids")
    names = [*kernels(model, "linear"), *kernels(model, "attention")]
    assert {name.partition("_")[0] for name in names} == {"linear", "attention"}
    assert all(name.endswith("_amx") for name in names)
    assert not [k.name for k in model.manifest.kernels if k.name not in names and "amx" in k.name]
    model.save(tmp_path / "model.turbo")
    code = artifact.read(tmp_path / "model.turbo").library
    assert all(name.encode() in code for name in names)
    assert TDPBF16PS.search(code)


@pytest.mark.slow
@pytest.mark.parametrize("target,precision", [("cpu:znver4", "bf16"), ("cpu:sapphirerapids", "fp32")])
def test_other_artifacts_do_without(compiled, target, precision, tmp_path):
    model = compiled(target, precision)
    assert not [k.name for k in model.manifest.kernels if "amx" in k.name]
    model.save(tmp_path / "model.turbo")
    assert not TDPBF16PS.search(artifact.read(tmp_path / "model.turbo").library)


def test_an_artifact_for_amx_does_not_run_without_it(compiled):
    if "amx-bf16" in targets.describe("cpu", targets.resolve("cpu")).features:
        pytest.skip("this machine has AMX")
    with pytest.raises(TurboError, match=r"'cpu:sapphirerapids' .* this machine's CPU lacks amx-bf16, "):
        compiled("cpu:sapphirerapids").run([[5, 6]])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_permission_is_asked_for_before_the_code_is_loaded(compiled, precision, monkeypatch, tmp_path):
    compiled("cpu:sapphirerapids").save(tmp_path / "model.turbo")
    opened = artifact.read(tmp_path / "model.turbo")
    opened = replace(opened, manifest=replace(opened.manifest, precision=precision))
    order = []

    class Loaded(Exception):
        pass

    def load(_):
        order.append("loaded")
        raise Loaded

    monkeypatch.setattr(loader, "check_host", lambda target: order.append("checked"))
    monkeypatch.setattr(loader, "request_amx", lambda target: order.append("asked"))
    monkeypatch.setattr(library, "load_library", load)
    with pytest.raises(Loaded):
        loader.open_model(opened, 1)
    assert order == ["checked", *(["asked"] if precision == "bf16" else []), "loaded"]
