"""`scripts/gpu_check` without a GPU, and its checks on the SIMT executor, where PyTorch has none to compare with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_gpu
from gpu_checks import checks
from gpu_checks.device import NoGpu, find

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.xdist_group("cuda-models")


@pytest.fixture
def gpu():
    """The executor as the GPU."""
    with simulated_gpu.machine():
        yield find()


@pytest.fixture(scope="module")
def module():
    return checks.bert(
        1, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=101, max_position_embeddings=64
    )


def test_without_a_gpu_it_says_so_and_fails():
    with pytest.raises(NoGpu):
        find()
    done = subprocess.run(
        [sys.executable, "-m", "gpu_checks"], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "no NVIDIA GPU that TVM can use, so nothing was checked" in done.stderr and "Traceback" not in done.stderr


def test_help():
    command = [sys.executable, "-m", "gpu_checks", "--help"]
    text = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, timeout=120).stdout
    assert all(name in text for name in checks.CHECKS)


def test_the_gpu_is_found(gpu):
    assert (gpu.architecture, gpu.torch_cuda, gpu.precisions) == ("sm_80", False, ("fp32", "fp16", "bf16"))


def test_parity(gpu, module, monkeypatch):
    monkeypatch.setattr(type(gpu), "precisions", ("fp16", "bf16"))
    results = checks.parity(gpu, 1, module, (1, 7, 33))
    assert [r.what for r in results] == ["fp16", "bf16"] and not any(r.wrong for r in results)


def test_wrong_answers_are_noticed(gpu, module, monkeypatch):
    monkeypatch.setattr(type(gpu), "precisions", ("fp16",))
    monkeypatch.setattr(checks, "TOLERANCES", dict.fromkeys(checks.TOLERANCES, 1e-12))
    assert all(r.wrong for r in checks.parity(gpu, 1, module, (5,)))


def test_kernels(gpu):
    results = checks.reductions(gpu, 2, [(9, 64)]) + checks.products(gpu, 2, [(9, 32, 40)])
    results += checks.attentions(gpu, 2, [(2, 20)], heads=1, head_dim=16)
    assert {r.check for r in results} == {"reductions", "products", "attention"}
    assert all(r.ours > 0 and r.theirs is None and len(r.samples["ours"]) == 2 for r in results)
    json.dumps([vars(r) for r in results])


def test_models_and_scheduler(gpu, module):
    (result,) = checks.models(gpu, 2, module, {"two": (3, 9)})
    assert result.ours > 0 and "tokens/s" in result.note
    (result,) = checks.scheduler(gpu, 1, module, count=8, longest=9)
    assert result.ours > 0 and result.theirs > 0 and "requests/s" in result.note
