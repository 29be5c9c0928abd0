"""Targets by name, and what is recorded of them."""

from __future__ import annotations

import platform

import pytest

from turbo_tvm import targets
from turbo_tvm.errors import TargetError
from turbo_tvm.runtime import cpu_features

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")


def test_cpu_is_this_machine():
    target = targets.resolve("cpu")
    spec = targets.describe("cpu", target)
    assert (spec.name, spec.triple_arch) == ("cpu", cpu_features.host_arch())
    assert spec.mcpu == str(target.attrs["mcpu"])
    cpu_features.check_host(spec)


@x86_only
@pytest.mark.parametrize(
    ("name", "has", "has_not"),
    [
        ("cpu:x86-64-v3", {"avx2", "fma"}, {"avx512f"}),
        ("cpu:x86-64-v4", {"avx2", "fma", "avx512f"}, {"avx512vnni"}),
        ("cpu:znver4", {"avx512f", "avx512vnni"}, set()),
    ],
)
def test_named_cpus_need_their_features(name, has, has_not):
    features = set(targets.describe(name, targets.resolve(name)).features)
    assert has <= features and not has_not & features


@x86_only
@pytest.mark.parametrize("name", ["cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:skylake-avx512"])
def test_bf16_needs_its_instructions(name):
    target = targets.resolve(name)
    targets.check_precision(target, "fp32")
    message = f"precision 'bf16' needs a CPU with AVX512-BF16, which {name[4:]} lacks: compile with precision='fp32'"
    with pytest.raises(TargetError, match=message):
        targets.check_precision(target, "bf16")


@x86_only
@pytest.mark.parametrize("name", ["cpu:znver4", "cpu:cooperlake", "cpu:sapphirerapids"])
def test_cpus_with_bf16(name):
    target = targets.resolve(name)
    targets.check_precision(target, "bf16")
    assert "avx512bf16" in targets.describe(name, target).features


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "CUDA targets are not supported by this version"),
        ("cuda:0", "CUDA targets are not supported by this version"),
        ("gpu", "unknown target 'gpu'; use 'cpu' for this machine"),
        ("", "unknown target ''"),
        ("cpu:", "unknown target 'cpu:'"),
        ("cpu:zorro", "unknown CPU 'zorro' in target 'cpu:zorro'"),
        ("cpu:znver4 -x", "unknown CPU"),
        (None, "unknown target"),
    ],
)
def test_other_names(name, message):
    with pytest.raises(TargetError, match=message):
        targets.resolve(name)


def test_other_architectures(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(TargetError, match=r"architecture 'riscv64' is not supported \(x86_64 and aarch64 are\)"):
        targets.resolve("cpu")
