"""Targets by name, and what is recorded of them."""

from __future__ import annotations

import platform

import pytest

from turbo_tvm.compiler import targets
from turbo_tvm.errors import TargetError
from turbo_tvm.runtime.device import cpu_features

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
AMX = {"amx-tile", "amx-int8", "amx-bf16"}
ALL_AVX512 = {"avx512" + name for name in ("f", "cd", "bw", "dq", "vl", "ifma", "vbmi", "vbmi2", "vnni", "bitalg")}


def test_cpu_is_this_machine():
    target = targets.resolve("cpu")
    spec = targets.describe("cpu", target)
    assert (spec.name, spec.triple_arch) == ("cpu", cpu_features.host_arch())
    assert spec.mcpu == str(target.attrs["mcpu"])
    cpu_features.check_host(spec)


def test_cpu_is_what_the_system_lists():
    assert set(targets.describe("cpu", targets.resolve("cpu")).features) == cpu_features.host_features()


@pytest.fixture
def machine(monkeypatch):
    """`machine(model, has)`: LLVM takes this machine for that model, and the system lists those features."""

    def machine(model, has):
        monkeypatch.setattr(targets.codegen, "llvm_get_system_cpu", lambda: model)
        monkeypatch.setattr(cpu_features, "host_features", lambda: frozenset(has))

    return machine


def features_of(name):
    return set(targets.describe(name, targets.resolve(name)).features)


@x86_only
@pytest.mark.parametrize(
    ("model", "shown", "hidden"),
    [
        ("rocketlake", {"avx512bf16", "avx512fp16", "avxvnni", *AMX}, set()),
        ("sapphirerapids", set(), AMX),
        ("sapphirerapids", set(), {"avx512fp16"}),
        ("rocketlake", set(), ALL_AVX512 | {"avx512vpopcntdq"}),
        ("znver4", {"avxvnni"}, {"avx512bf16", "sse4a", "sha"}),
        ("haswell", ALL_AVX512, {"movbe"}),
    ],
)
def test_cpu_has_the_features_of_the_system_and_not_of_the_model(machine, model, shown, hidden):
    usual = features_of(f"cpu:{model}")
    assert hidden <= usual and not shown & usual
    machine(model, usual - hidden | shown)
    target = targets.resolve("cpu")
    assert set(map(str, target.attrs["mattr"])) == {f"+{name}" for name in shown} | {f"-{name}" for name in hidden}
    assert str(target.attrs["mcpu"]) == model
    assert features_of("cpu") == usual - hidden | shown


@x86_only
def test_a_model_that_shows_its_features_stays_as_it_is(machine):
    machine("znver4", features_of("cpu:znver4"))
    target = targets.resolve("cpu")
    assert str(target) == str(targets.resolve("cpu:znver4")) and "mattr" not in target.attrs


@x86_only
def test_bf16_under_the_number_of_a_model_without_it(machine):
    """A virtual machine with AMX calls itself Rocket Lake."""
    usual = features_of("cpu:rocketlake")
    machine("rocketlake", usual)
    with pytest.raises(TargetError, match="which rocketlake lacks"):
        targets.check_precision(targets.resolve("cpu"), "bf16")
    machine("rocketlake", usual | {"avx512bf16"})
    targets.check_precision(targets.resolve("cpu"), "bf16")


@x86_only
def test_a_named_cpu_is_not_corrected(machine):
    usual = features_of("cpu:znver4")
    machine("znver4", usual - {"avx512bf16"})
    assert features_of("cpu:znver4") == usual


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
        ("cuda:0", "unknown GPU architecture .0."),
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
