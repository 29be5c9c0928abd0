"""`turbo-tvm cost`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from cli_runner import succeed

from turbo_tvm.artifact import file as artifact
from turbo_tvm.runtime.device.cpu_features import machine_name


@pytest.mark.xdist_group("served")
def test_a_cost_is_measured_once_and_kept(tiny_artifact, tmp_path):
    path = tmp_path / "tiny.turbo"
    shutil.copy(tiny_artifact, path)
    text = succeed("cost", path, "--seconds", "0.2", "--threads", "1")
    for words in ("Milliseconds per batch", "batch 64", machine_name(1), "off by"):
        assert words in text
    first = json.loads(succeed("cost", path, "--threads", "1", "--json"))
    kept = artifact.read(path).manifest.costs
    assert list(kept) == [machine_name(1)] and kept[machine_name(1)].error == first["error"]
    again = json.loads(succeed("cost", path, "--threads", "1", "--json", "--remeasure", "--seconds", "0.2"))
    assert again["points"] > 0 and list(artifact.read(path).manifest.costs) == [machine_name(1)]
    assert machine_name(1) in succeed("inspect", path)


def test_a_cost_that_is_known_is_shown(priced):
    before = priced.read_bytes()
    text = succeed("cost", priced, "--threads", "1")
    assert "from 9 measured batches; off by 3.0%" in text and "1.41" in text  # 8 tokens: 1 + 0.01 + 0.4 ms
    assert priced.read_bytes() == before


@pytest.mark.parametrize("cpu", ["C", "A CPU with a long name " * 12])
def test_what_a_cost_shows_does_not_depend_on_the_name_of_the_machine(
    tiny_artifact, tmp_path, monkeypatch, cost_spec, cpu
):
    monkeypatch.setattr("turbo_tvm.runtime.executor.machine_name", lambda threads: cpu)
    a, path = artifact.read(tiny_artifact), tmp_path / "tiny.turbo"
    artifact.write(path, replace(a.manifest, costs={cpu: cost_spec}), a.library, a.weights, a.tokenizer)
    assert f"{cpu}: packed cost, from 9 measured batches; off by 3.0%" in succeed("cost", path, "--threads", "1")
