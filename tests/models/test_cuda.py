"""CUDA targets from end to end: whole models in the SIMT executor, and machine code by nvcc."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from ctypes.util import find_library
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import simt
import simulated_gpu
import torch
from cli_runner import fail, succeed

import turbo_tvm
from turbo_tvm import config
from turbo_tvm.artifact import file as artifact
from turbo_tvm.artifact.file import Artifact
from turbo_tvm.artifact.manifest import DeviceKernelSpec
from turbo_tvm.compiler import compile as compiler
from turbo_tvm.compiler.cuda import machine_code, nvrtc
from turbo_tvm.compiler.cuda.block_counts import BlockCounts
from turbo_tvm.errors import ArtifactError, CompileError, TargetError, TurboError
from turbo_tvm.profiling import sass
from turbo_tvm.runtime.device import gpu

pytestmark = pytest.mark.xdist_group("cuda-models")

# What rounding to 16 bits may make of outputs of about 1.
TOLERANCES = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.08}
LENGTHS = (1, 7, 33, 64, 2)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def simulated():
    with simulated_gpu.machine() as device:
        yield device


@pytest.fixture(scope="session")
def file_of(shared, module_of):
    """`file_of(name, precision)`: one of the shared models, compiled for the executor once per run."""

    def get(name, precision="fp32"):
        def make(folder):
            imported = shared.imported(f"served {name}", lambda: module_of(name))
            with simulated_gpu.compiler(), mock.patch.object(compiler, "import_model", lambda *_: imported):
                turbo_tvm.compile(imported.name, target="cuda:sm_80", precision=precision).save(folder / "m.turbo")

        return shared.made(f"{name} for the executor, {precision}", make) / "m.turbo"

    return get


@pytest.fixture
def on_gpu(simulated, file_of):
    """`on_gpu(name, precision)`: the same, loaded anew, so that no test knows the batches of another."""
    return lambda name, precision="fp32": turbo_tvm.load(file_of(name, precision))


def requests(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 101, n) for n in lengths]


def reference(module, sequence):
    """What PyTorch answers to one sequence."""
    with torch.no_grad():
        ids = torch.tensor(sequence)[None]
        return dict(module(input_ids=ids, attention_mask=torch.ones_like(ids)).items())


def agree(module, compiled, tolerance):
    for spec in compiled.manifest.outputs:
        for sequence, got in zip(requests(), compiled.run(requests(), output=spec.name), strict=True):
            want = reference(module, sequence)[spec.name][0].numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


MORE = (("bert", "fp16"), ("bert", "bf16"), ("mean", "fp16"), ("answers", "fp16"))


class TestModels:
    @pytest.mark.parametrize(
        ("name", "precision"),
        [
            ("bert", "fp32"),
            ("clip_text", "fp16"),
            ("mpnet", "bf16"),
            *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE),
        ],
    )
    def test_agree_with_pytorch(self, simulated, on_gpu, module_of, name, precision):
        module, compiled = module_of(name), on_gpu(name, precision)
        assert compiled.manifest.layout == "packed" and compiled.manifest.target.device == "cuda"
        agree(module, compiled, TOLERANCES[precision])
        counts = simulated.counts()
        assert (counts.mma > 0) == (precision != "fp32")

    def test_images(self, on_gpu, module_of):
        module, compiled = module_of("vit"), on_gpu("vit", "fp16")
        pixels = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = module(pixel_values=pixels)
        for name, got in compiled(pixel_values=pixels).items():
            assert (got - wanted[name]).abs().max() < TOLERANCES["fp16"] * max(1, wanted[name].abs().max())

    def test_what_no_pass_recognises_is_padded(self, on_gpu, module_of):
        compiled = on_gpu("padded")
        assert compiled.manifest.layout == "padded"
        agree(module_of("padded"), compiled, 1e-5)

    def test_saved_and_loaded(self, simulated, module_of, tmp_path):
        compiled = turbo_tvm.compile(module_of("bert"), target="cuda:sm_80,sm_90", precision="fp16")
        agree(module_of("bert"), compiled, TOLERANCES["fp16"])
        compiled.save(tmp_path / "m.turbo")
        loaded = turbo_tvm.load(tmp_path / "m.turbo")
        assert loaded.manifest.target.architectures == ("sm_80", "sm_90")
        for a, b in zip(compiled.run(requests()), loaded.run(requests()), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_the_profiler_times_every_kernel(self, on_gpu):
        compiled = on_gpu("bert", "fp16")
        report = compiled.profile([3, 20], rounds=2)
        assert {k.name for k in report.kernels} >= {k.name for k in compiled.manifest.kernels}

    def test_the_command_that_profiles(self, simulated, file_of, tmp_path):
        path = file_of("bert", "fp16")
        out = succeed("profile", path, "--lengths", "3,9", "--rounds", "2")
        assert "attention" in out and "linear" in out
        line = ("profile", path, "--lengths", "3", "--plot", tmp_path / "roof.png")
        assert "limits, which are measured of CPUs only" in fail(*line)

    def test_a_budget_of_memory(self, on_gpu):
        compiled = on_gpu("bert")
        whole = compiled.run(requests())
        compiled.memory_budget = compiled.peak_bytes([64]) + 64
        for a, b in zip(whole, compiled.run(requests()), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


class TestGraphs:
    """TVM's rewrite lifts the kernels; what a graph is here also checks that nothing has moved since it was made."""

    @pytest.fixture
    def compiled(self, on_gpu):
        return on_gpu("bert", "fp16")

    def test_a_shape_that_repeats_is_replayed(self, simulated, compiled):
        first = compiled.run(requests())
        for seed in (0, 1, 2):
            again = compiled.run(requests(seed=seed))
        assert (simulated.graphs.captures, simulated.graphs.replays) == (1, 2)
        with pytest.raises(AssertionError):
            np.testing.assert_array_equal(first[3], again[3])  # other tokens, other answers
        np.testing.assert_array_equal(first[3], compiled.run(requests())[3])

    def test_memory_that_moves_makes_graphs_anew(self, simulated, compiled):
        short, long = requests((3, 4)), requests((64,) * 9)
        wanted = compiled.run(short)
        compiled.run(short)
        compiled.run(long)  # the chunk grows, and moves
        for _ in range(3):
            np.testing.assert_array_equal(compiled.run(short)[1], wanted[1])
        assert simulated.graphs.captures == 2

    def test_any_mix_of_shapes(self, simulated, compiled):
        rng = np.random.default_rng(3)
        mixes = [tuple(rng.integers(1, 64, rng.integers(1, 6)).tolist()) for _ in range(6)]
        wanted = [compiled.run(requests(mix)) for mix in mixes]
        for i in rng.integers(0, len(mixes), 30):
            for a, b in zip(compiled.run(requests(mixes[i])), wanted[i], strict=True):
                np.testing.assert_array_equal(a, b)
        assert simulated.graphs.replays > 10

    def test_they_can_be_switched_off(self, simulated, on_gpu, monkeypatch):
        monkeypatch.setenv("TURBO_TVM_CUDA_GRAPHS", "0")
        compiled = on_gpu("bert")
        for _ in range(3):
            compiled.run(requests())
        assert simulated.graphs.captures == 0


@pytest.fixture(scope="module")
def path(module_of, tmp_path_factory):
    """A model for two architectures; its machine code is for the executor."""
    folder = tmp_path_factory.mktemp("cuda")
    with simulated_gpu.compiler():
        compiled = turbo_tvm.compile(module_of("bert"), target="cuda:sm_75,sm_86", precision="fp16")
    with pytest.raises(TurboError, match=r"this machine has none.*can be saved here"):
        compiled.run(requests())
    compiled.save(folder / "m.turbo")
    return folder / "m.turbo"


class TestWithoutAGpu:
    def test_loading_says_what_is_missing(self, path):
        with pytest.raises(
            ArtifactError, match=r"compiled for NVIDIA GPUs \(sm_75, sm_86\), and this machine has none"
        ):
            turbo_tvm.load(path)

    @pytest.mark.skipif(find_library("cuda") is not None, reason="there is a driver")
    def test_a_process_that_only_runs_models_looks_for_tvms_cuda_runtime(self, path):
        """It has TVM without its back ends; here the search ends at the driver."""
        code = f"import turbo_tvm\ntry: turbo_tvm.load({str(path)!r})\nexcept turbo_tvm.TurboError as e: print(e)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert "this machine has none that can be used (" in done.stdout and "libcuda.so" in done.stdout, done.stderr

    def test_a_gpu_of_another_generation(self, path):
        with (
            simt.device(),
            pytest.raises(ArtifactError, match=r"GPU is an sm_80.*code for sm_75, sm_86.*target='cuda:sm_80'"),
        ):
            turbo_tvm.load(path)

    def test_every_byte_of_machine_code_is_verified(self, path, tmp_path):
        data = bytearray(path.read_bytes())
        at = data.find(simt.MACHINE_CODE) + 1000
        data[at] ^= 1
        (tmp_path / "bad.turbo").write_bytes(data)
        with pytest.raises(ArtifactError, match=r"sm_75\.cubin"):
            artifact.read(tmp_path / "bad.turbo")

    def test_code_that_is_not_the_manifests(self, path, tmp_path, monkeypatch):
        """A library whose source has another sum than the manifest's finds no machine code."""
        monkeypatch.setattr(gpu, "_known", {})
        opened = artifact.read(path)
        target = replace(opened.manifest.target, architectures=("sm_80",))
        manifest = replace(opened.manifest, target=target, device_source="0" * 64, members={})
        cubins = {"sm_80": opened.cubins["sm_86"]}
        artifact.write(tmp_path / "m.turbo", manifest, opened.library, opened.weights, None, cubins)
        with simt.device(), pytest.raises(ArtifactError):
            turbo_tvm.load(tmp_path / "m.turbo")

    def test_choosing(self, monkeypatch):
        with simt.device():
            assert gpu.choose(["sm_80", "sm_75", "sm_90"]) == "sm_80"
            for names in (["sm_90"], ["sm_86"], ["sm_75"]):
                with pytest.raises(ArtifactError, match="GPU is an sm_80"):
                    gpu.choose(names)


class TestErrors:
    @pytest.mark.parametrize(
        ("target", "precision", "message"),
        [
            ("cuda", "fp32", "unknown GPU architecture ''"),
            ("cuda:80", "fp32", "unknown GPU architecture '80'"),
            ("cuda:sm_80,", "fp32", "unknown GPU architecture ''"),
            ("cuda:sm_61", "fp32", "before sm_70"),
            ("cuda:sm_75", "bf16", "'bf16' needs a GPU from sm_80 on"),
            ("cuda:sm_80", "int8", "precision 'int8' is not supported"),
            ("cpu", "fp16", "'fp16' is for GPUs"),
        ],
    )
    def test_targets(self, target, precision, message):
        with pytest.raises(TargetError, match=message):
            turbo_tvm.compile(None, target=target, precision=precision)

    @pytest.fixture
    def toolkit(self, monkeypatch, tmp_path):
        """`toolkit(script)`: an nvcc that is that script, or none, and no packages."""

        def make(script: str | None) -> None:
            for name in ("CUDA_HOME", "CUDA_PATH"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setattr(nvrtc, "find", lambda: None)
            if script is None:
                monkeypatch.delenv("TURBO_TVM_NVCC", raising=False)
                monkeypatch.setattr(config.shutil, "which", lambda name: None if "nvcc" in str(name) else "/bin/true")
            else:
                (tmp_path / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
                (tmp_path / "nvcc").chmod(0o755)
                monkeypatch.setenv("TURBO_TVM_NVCC", str(tmp_path / "nvcc"))

        return make

    def test_no_compiler(self, toolkit):
        toolkit(None)
        with pytest.raises(CompileError, match=r"no compiler .*install the CUDA toolkit.*TURBO_TVM_NVCC.*\[cuda12\]"):
            turbo_tvm.compile(None, target="cuda:sm_80")

    def test_an_nvcc_that_is_not_there(self, monkeypatch):
        monkeypatch.setenv("TURBO_TVM_NVCC", "/nowhere/nvcc")
        with pytest.raises(CompileError, match="no program '/nowhere/nvcc', which TURBO_TVM_NVCC names"):
            compiler.compile(None, target="cuda:sm_80")

    def test_an_nvcc_that_does_not_run(self, toolkit):
        toolkit("echo no licence >&2; exit 3")
        with pytest.raises(CompileError, match="does not run: no licence"):
            turbo_tvm.compile(None, target="cuda:sm_80")

    def test_an_architecture_that_nvcc_has_dropped(self, toolkit):
        toolkit("echo sm_75 sm_80 sm_90a")
        with pytest.raises(TargetError, match=r"code for 'sm_70', only for sm_75, sm_80; for older GPUs.*\[cuda12\]"):
            turbo_tvm.compile(None, target="cuda:sm_70")

    @needs_nvcc
    def test_a_source_that_nvcc_refuses(self):
        with pytest.raises(CompileError, match=r"nvcc failed for sm_80: .*error"):
            machine_code.compile_source('extern "C" __global__ void f() { nonsense; }', ["sm_80"], {})


SOURCE = """
extern "C" __global__ void __launch_bounds__(64) f_kernel(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[63 - threadIdx.x] + __shfl_xor_sync(0xffffffffu, s[threadIdx.x], 1);
}
"""


@needs_nvcc
class TestMachineCode:
    def test_a_kernel_and_its_report(self):
        code = machine_code.compile_source(SOURCE, ["sm_80", "sm_90"], {"f": BlockCounts(8, 64, 1)})
        assert [k.architecture for k in code.kernels] == ["sm_80", "sm_90"]
        for kernel in code.kernels:
            assert (kernel.name, kernel.rows, kernel.threads, kernel.barriers) == ("f", 8, 64, 1)
            assert kernel.static_shared_bytes == 256 + 1024 * (kernel.architecture == "sm_90") or kernel.registers > 0
            assert kernel.spill_bytes == 0 and 0 < kernel.registers < 64
        assert all(cubin[:4] == b"\x7fELF" for cubin in code.cubins.values())
        assert code.source == hashlib.sha256(SOURCE.encode()).hexdigest()

    def test_what_it_consists_of(self):
        if config.nvdisasm() is None:
            pytest.skip("needs nvdisasm")
        code = machine_code.compile_source(SOURCE, ["sm_80"], {})
        counts = sass.instructions(config.nvdisasm(), code.cubins["sm_80"])["f"]
        assert (counts["BAR"], counts["SHFL"]) == (1, 1) and counts["LDL"] == 0
        assert "1 SHFL, 1 BAR" in sass.summary(counts)
        with pytest.raises(TurboError, match="cannot read the machine code"):
            sass.instructions(config.nvdisasm(), b"nonsense")

    def test_spills_are_counted(self):
        body = "".join(f"  float v{i} = x[{i} * n]; " for i in range(300))
        body += "__syncthreads();" + "".join(f" x[{i}] = v{i} * v{299 - i};" for i in range(300))
        source = f'extern "C" __global__ void __launch_bounds__(1024) g_kernel(float* x, int n) {{ {body} }}'
        (kernel,) = machine_code.compile_source(source, ["sm_80"], {}).kernels
        assert kernel.spill_bytes > 0

    @pytest.mark.skipif(nvrtc.find() is None, reason="needs the packages of turbo-tvm[cuda12]")
    def test_by_the_compiler_in_packages(self, monkeypatch):
        monkeypatch.setattr(config, "nvcc", lambda: None)
        code = machine_code.compile_source(SOURCE, ["sm_70", "sm_80"], {"f": BlockCounts(8, 64, 1)})
        assert [(k.architecture, k.static_shared_bytes, k.spill_bytes) for k in code.kernels] == [
            ("sm_70", 256, 0),
            ("sm_80", 256, 0),
        ]
        with pytest.raises(CompileError, match=r"(?s)nvrtc failed for sm_70: .*nonsense"):
            machine_code.compile_source('extern "C" __global__ void f() { nonsense; }', ["sm_70"], {})

    @pytest.mark.skipif(nvrtc.find() is None, reason="needs the packages of turbo-tvm[cuda12]")
    def test_who_compiles_for_what(self):
        chosen = machine_code.choose_compilers(["sm_70", "sm_90"])
        assert type(chosen["sm_90"]).__name__ == "Nvcc"
        assert "sm_70" in chosen["sm_90"].architectures() or type(chosen["sm_70"]).__name__ == "Nvrtc"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("precision", "target"),
        [("fp16", "cuda:sm_75,sm_80,sm_90"), ("fp32", "cuda:sm_75"), ("bf16", "cuda:sm_89")],
    )
    def test_no_kernel_of_bert_spills(self, precision, target, tmp_path):
        from transformers import BertConfig, BertModel

        model = turbo_tvm.compile(
            BertModel(BertConfig(num_hidden_layers=1)).eval(), target=target, precision=precision, name="layer"
        )
        kernels = model.manifest.device_kernels
        assert len(kernels) == len(model.manifest.target.architectures) * len({k.name for k in kernels})
        assert {k.name for k in kernels} >= {k.name for k in model.manifest.kernels}
        assert sum(k.spill_bytes for k in kernels) == 0
        for kernel in kernels:
            if kernel.name.startswith(("norm", "embedding")):
                assert kernel.barriers == 0 and kernel.shuffles > 0
        model.save(tmp_path / "layer.turbo")
        text = succeed("inspect", tmp_path / "layer.turbo", "--kernels")
        assert "no kernel spills registers" in text and f"Kernels on {target[5:10]}" in text


@needs_nvcc
def test_the_command_says_what_next(tiny_folder, tmp_path):
    out = succeed("compile", tiny_folder, "-o", tmp_path / "m.turbo", "--target", "cuda:sm_80", "--precision", "fp16")
    assert "cuda:sm_80 (x86-64), fp16\n" in out and "next: turbo-tvm inspect" in out and "--kernels" in out
    assert "GPUs" in succeed("inspect", tmp_path / "m.turbo")


def test_code_that_the_disassembler_refuses_is_left_out(path, monkeypatch):
    monkeypatch.setattr(config, "nvdisasm", lambda: "/bin/false")
    machine = replace(artifact.read(path).manifest, device_kernels=(DeviceKernelSpec("k", "sm_75", 32, 0, 0),))
    monkeypatch.setattr(artifact, "read", lambda _: Artifact(machine, b"", {}, None, path, {"sm_75": b"code"}))
    out = succeed("inspect", path, "--kernels")
    assert "sm_75: nvdisasm cannot read the machine code" in out and "no kernel spills registers" in out


def test_a_cost_is_kept_by_the_gpus_name(on_gpu):
    compiled = on_gpu("bert", "fp16")
    compiled.measure_cost(budget_s=0.2)
    assert list(compiled.manifest.costs) == ["SIMT executor"] and compiled.cost([3, 4]) > 0


def test_inspect_kernels_of_a_cpus_model(tiny_artifact):
    assert "has no GPU kernels" in fail("inspect", tiny_artifact, "--kernels")
