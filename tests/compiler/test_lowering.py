"""Lowering with the kernel cache cold, warm and off: the same model, and no kernel compiled twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import turbo_tvm
from turbo_tvm.compiler import kernel_objects, lowering, pipeline, targets
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu.tiles import cpu_tiles

MACHINE = targets.resolve("cpu")
TILES = cpu_tiles(MACHINE)


@pytest.fixture(scope="module")
def imported(tiny_folder):
    from transformers import AutoModel

    return import_module(AutoModel.from_pretrained(tiny_folder))


@pytest.fixture(scope="module")
def optimized(imported):
    return pipeline.optimize(imported.mod, TILES, imported.request_limits.max_length)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for this test."""
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    """`no_compiler()`: from now on a kernel that is built or compiled is an error."""

    def forbid() -> None:
        def refuse(*_args, **_options):
            raise AssertionError("a kernel was compiled that the cache has")

        monkeypatch.setattr(KernelRecipe, "build", refuse)
        monkeypatch.setattr(kernel_objects, "compile_kernel", refuse)

    return forbid


def build(optimized, imported, **options) -> lowering.Built:
    return lowering.build(optimized, imported.weights, MACHINE, **options)


def test_a_second_build_compiles_no_kernel(optimized, imported, cache, no_compiler):
    cold = build(optimized, imported)
    no_compiler()
    warm = build(optimized, imported)
    assert cold.cached_kernels == 0 and cold.compiled_kernels > 0
    assert (warm.compiled_kernels, warm.cached_kernels) == (0, cold.compiled_kernels)
    assert len(list(cache.iterdir())) == cold.compiled_kernels
    assert (warm.memory, warm.outputs) == (cold.memory, cold.outputs)
    for name, array in cold.parameters.items():
        np.testing.assert_array_equal(warm.parameters[name], array)


def test_steps_are_the_kernels_by_their_names(optimized, imported, cache):
    built = build(optimized, imported)
    assert set(built.memory.steps) == {spec.name for spec in optimized.kernels}
    assert any(buffer.replaces for buffer in built.memory.buffers)


def test_a_kernel_in_other_variants_is_other_code(optimized, imported, cache):
    build(optimized, imported)
    linear = next(spec for spec in optimized.kernels if spec.family == "linear")
    setting = KernelRecipe.from_json(linear.recipe).space.default
    tuned = build(optimized, imported, tuned={linear.name: (Variant(tuple(setting.items())),)})
    assert tuned.compiled_kernels == 1 < tuned.cached_kernels


@pytest.mark.parametrize("setting", ["0", "/proc/no/such/directory"])
def test_without_a_cache_everything_is_compiled(optimized, imported, monkeypatch, setting):
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", setting)
    first, second = build(optimized, imported), build(optimized, imported)
    assert first.cached_kernels == second.cached_kernels == 0
    assert first.compiled_kernels == second.compiled_kernels > 0


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_answers_are_the_same_with_the_cache_cold_warm_and_off(
    tiny_folder, cache, monkeypatch, no_compiler, random_requests, precision
):
    if precision == "bf16" and "avx512bf16" not in targets.describe("cpu", MACHINE).features:
        pytest.skip("this CPU has no AVX512-BF16")

    def answers() -> list[np.ndarray]:
        model = turbo_tvm.compile(tiny_folder, precision=precision, progress=False)
        requests = [[ids[:40] % 40 for ids in request] for request in random_requests(5)]
        return [np.asarray(row) for request in requests for row in model.run(request)]

    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", "0")
    off = answers()
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", str(cache))
    cold = answers()
    no_compiler()
    for got in (cold, answers()):
        assert len(got) == len(off) > 0
        assert all(np.array_equal(a, b) for a, b in zip(got, off, strict=True))


def test_progress_says_how_many_kernels_came_from_the_cache(tiny_folder, cache, capsys):
    turbo_tvm.compile(tiny_folder, progress=True)
    assert "in the cache" not in capsys.readouterr().err
    turbo_tvm.compile(tiny_folder, progress=True)
    assert "kernels were in the cache" in capsys.readouterr().err
