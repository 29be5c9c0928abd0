"""CPU features: the translation to LLVM's names, and the refusal of code that this machine cannot run."""

import ctypes
import errno
import platform

import pytest

from turbo_tvm.artifact.manifest import TargetSpec
from turbo_tvm.errors import ArtifactError, TargetError
from turbo_tvm.runtime.device import cpu_features
from turbo_tvm.runtime.device.cpu_features import check_host, checkable, host_arch, host_features, missing, request_amx

V3_FLAGS = "cmov cx8 cx16 mmx sse sse2 pni ssse3 sse4_1 sse4_2 lahf_lm popcnt abm movbe bmi1 bmi2 avx f16c avx2 fma"
V4_FLAGS = f"{V3_FLAGS} avx512f avx512dq avx512cd avx512bw avx512vl"
ZEN4 = f"""processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC: 9R14
flags\t\t: fpu {V4_FLAGS} aes pclmulqdq sha_ni gfni vaes vpclmulqdq avx512ifma avx512vbmi \
avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_bf16 xsave pku
bugs\t\t: sysret_ss_attrs

processor\t: 1
"""
HASWELL = f"flags : fpu {V3_FLAGS}\n"
GRAVITON3 = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc \
dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm i8mm bf16
"""
V3 = (
    "avx",
    "avx2",
    "bmi",
    "bmi2",
    "cmov",
    "cx16",
    "f16c",
    "fma",
    "lzcnt",
    "movbe",
    "popcnt",
    "sahf",
    "sse4.2",
)


def _spec(arch="x86_64", features=V3):
    return TargetSpec("cpu", arch, "some-cpu", tuple(features))


def test_x86_names():
    found = host_features(ZEN4, "x86_64")
    assert set(V3) | {"sse3", "sse4.1", "pclmul", "sha", "avx512vnni", "avx512bf16", "avx512vpopcntdq"} <= found
    assert {"pni", "abm", "avx512_vnni", "xsave", "pku"}.isdisjoint(found)
    assert host_features("flags : avx_vnni avx512_fp16 amx_tile amx_bf16 amx_int8", "x86_64") == {
        "avxvnni",
        "avx512fp16",
        "amx-tile",
        "amx-bf16",
        "amx-int8",
    }


def test_aarch64_names():
    found = host_features(GRAVITON3, "aarch64")
    assert {
        "neon",
        "fp-armv8",
        "dotprod",
        "fullfp16",
        "fp16fml",
        "bf16",
        "i8mm",
        "sve",
        "lse",
        "crc",
    } <= found
    assert "sve2" not in found


def test_only_what_every_core_has_counts():
    assert host_features("flags : avx2 avx512f\n\nflags : avx2\n", "x86_64") == {"avx2"}


def test_checkable_drops_tuning_flags_and_system_instructions():
    names = ["fma", "fast-movbe", "avx512f", "prefer-256-bit", "xsave", "pku", "avx512f"]
    assert checkable(names, "x86_64") == ("avx512f", "fma")
    assert checkable(["neon", "avx2"], "aarch64") == ("neon",)
    assert checkable(["v"], "riscv64") == ()


def test_missing():
    assert missing(["avx2", "avx512f", "avx512bf16"], HASWELL, "x86_64") == ("avx512bf16", "avx512f")
    assert missing(["avx2"], HASWELL, "x86_64") == ()
    # A later turbo_tvm may record a feature that this one cannot look up: not known to be there is not there.
    assert missing(["avx42"], ZEN4, "x86_64") == ("avx42",)


def test_every_checkable_feature_can_be_present():
    for arch, key in (("x86_64", "flags"), ("aarch64", "Features")):
        table = cpu_features._TABLE[arch]
        assert host_features(f"{key} : {' '.join(table.values())}", arch) == table.keys()


def test_a_capable_host_passes():
    check_host(_spec(), HASWELL, "x86_64")
    check_host(_spec("aarch64", ["neon", "dotprod"]), GRAVITON3, "aarch64")


def test_a_lesser_cpu_is_told_what_it_lacks():
    with pytest.raises(ArtifactError, match=r"CPU lacks avx512f, avx512vl: .*target=\"cpu\".*cpu:x86-64-v3"):
        check_host(_spec(features=[*V3, "avx512f", "avx512vl"]), HASWELL, "x86_64")
    with pytest.raises(ArtifactError, match=r"CPU lacks sve2: .*target=\"cpu\" on this machine$"):
        check_host(_spec("aarch64", ["neon", "sve2"]), GRAVITON3, "aarch64")


def test_another_architecture():
    with pytest.raises(ArtifactError, match=r"compiled for aarch64 .*this machine is x86_64"):
        check_host(_spec("aarch64", []), ZEN4, "x86_64")
    with pytest.raises(ArtifactError, match="this machine is riscv64"):
        check_host(_spec(), "", "riscv64")


def test_unknown_features_are_a_target_error(monkeypatch, tmp_path):
    with pytest.raises(TargetError, match="no 'flags' line"):
        host_features("Processor : something else", "x86_64")
    with pytest.raises(TargetError, match="'riscv64' is not supported"):
        host_features(ZEN4, "riscv64")
    monkeypatch.setattr(cpu_features, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(TargetError, match=r"cannot be read \(No such file or directory\).*Linux"):
        check_host(_spec(), arch="x86_64")
    check_host(_spec(features=[]), arch="x86_64")  # nothing required, nothing to look up


@pytest.mark.parametrize(("machine", "arch"), [("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")])
def test_architecture_names(monkeypatch, machine, arch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host_arch() == arch


def test_this_machine_passes_its_own_check():
    check_host(_spec(host_arch(), sorted(host_features())))


def test_the_table_covers_what_llvm_may_use():
    """What the table leaves out of LLVM's x86-64-v4 is neither vector nor bit arithmetic."""
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v4", "mtriple": "x86_64-linux-gnu"})
    features = tvm.target.codegen.llvm_get_cpu_features(target)
    assert {*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(checkable(features, "x86_64"))
    left = set(features) - set(checkable(features, "x86_64"))
    assert not [name for name in left if name.startswith(("avx", "sse", "amx", "bmi"))]


AMX = ("amx-bf16", "amx-tile", *V3)


@pytest.fixture
def system():
    """`system(error=0)`: a system call that gives this error, and the arguments of its calls."""

    def make(error=0):
        calls = []

        def syscall(*arguments):
            calls.append([argument.value for argument in arguments])
            ctypes.set_errno(error)
            return -1 if error else 0

        return syscall, calls

    return make


def test_amx_is_asked_for_where_the_code_may_use_it(system):
    syscall, calls = system()
    request_amx(_spec(features=AMX), syscall)
    assert calls == [[158, 0x1023, 18]]  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    request_amx(_spec(), syscall)
    request_amx(_spec("aarch64", ["neon"]), syscall)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM])
def test_a_system_that_refuses_amx(system, error):
    message = rf"uses AMX, which the system refuses this process \({cpu_features.os.strerror(error)}\): run it on Linux"
    with pytest.raises(ArtifactError, match=message + r'.*precision="fp32"'):
        request_amx(_spec(features=AMX), system(error)[0])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a system call of x86-64")
def test_this_machine_grants_amx_if_it_has_it():
    if "amx-tile" in host_features():
        request_amx(_spec(features=AMX))
    else:
        with pytest.raises(ArtifactError, match="which the system refuses this process"):
            request_amx(_spec(features=AMX))


def test_cpu_names(monkeypatch, tmp_path):
    text = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_features, "CPUINFO", text)
    assert cpu_features.cpu_name() == "unknown CPU"
    text.write_text(
        "processor: 0\nmodel\t\t: 2\nmodel name\t: A: 1 GHz\ncpu family: 26\n\nprocessor: 1\nmodel name: B\n"
    )
    assert cpu_features.cpu_name() == "A: 1 GHz, 26, 2"
    text.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    assert cpu_features.cpu_name() == "0x41, 0xd0c"
    assert cpu_features.machine_name(1) == "0x41, 0xd0c; 1 thread"
    assert cpu_features.machine_name(8) == "0x41, 0xd0c; 8 threads"
