"""Object code of kernels: keys that say everything the code depends on, and code that is compiled once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from turbo_tvm.compiler import kernel_objects, targets
from turbo_tvm.compiler.kernel_cache import KernelCache
from turbo_tvm.compiler.kernel_objects import Kernel, KernelObjects, compile_kernel, key_of
from turbo_tvm.schedules.common.space import Variant

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


def scale(factor: float) -> tirx.PrimFunc:
    @T.prim_func(s_tir=True, private=True)
    def scaled(x: T.handle, y: T.handle):
        n = T.int64()
        source = T.match_buffer(x, (n, 8), "float32")
        out = T.match_buffer(y, (n, 8), "float32")
        for i in T.parallel(n):
            for j in range(8):
                out[i, j] = source[i, j] * T.float32(factor)

    return scaled


@dataclass(frozen=True)
class FakeRecipe:
    """Rows times a factor; `built` has an element per time that it was built."""

    factor: float = 2.0
    version: int = 1
    built: list[float] = field(default_factory=list, compare=False)

    def to_json(self) -> str:
        return f'{{"factor":{self.factor}}}'

    def build(self, overwrites, variants):
        self.built.append(self.factor)
        return scale(self.factor)


KERNEL = Kernel("scale_2", FakeRecipe())


class TestKeys:
    def test_equal_kernels_have_one_key(self):
        assert key_of("scale_2", KERNEL, TARGET) == key_of("scale_2", Kernel("scale_2", FakeRecipe()), TARGET)

    @pytest.mark.parametrize(
        "other",
        [
            replace(KERNEL, recipe=FakeRecipe(3.0)),
            replace(KERNEL, recipe=FakeRecipe(version=2)),
            replace(KERNEL, overwrites=(0,)),
            replace(KERNEL, variants=(Variant((("unroll", 2),)),)),
            replace(KERNEL, variants=(Variant((("unroll", 4),)),)),
            replace(KERNEL, variants=(Variant((("unroll", 2),), max_rows=8), Variant((("unroll", 4),)))),
        ],
        ids=["recipe", "version", "overwrites", "variant", "another variant", "two variants"],
    )
    def test_another_kernel_has_another_key(self, other):
        variants = [replace(KERNEL, variants=(Variant((("unroll", 2),)),))]
        keys = {key_of("scale_2", kernel, TARGET) for kernel in [KERNEL, *variants]}
        assert len(keys) == 2
        assert (key_of("scale_2", other, TARGET) in keys) == (other in variants)

    @pytest.mark.parametrize(
        "target",
        [
            {"kind": "llvm", "mcpu": "x86-64-v4"},
            {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avx512f"]},
            {"kind": "llvm", "mcpu": "x86-64-v3", "mtriple": "x86_64-linux-gnu"},
        ],
    )
    def test_another_target_has_another_key(self, target):
        assert key_of("scale_2", KERNEL, tvm.target.Target(target)) != key_of("scale_2", KERNEL, TARGET)

    def test_another_name_has_another_key(self):
        assert key_of("scale_2_1", KERNEL, TARGET) != key_of("scale_2", KERNEL, TARGET)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("tvm.__version__", "0.28"),
            ("tvm_ffi.__version__", "0.2"),
            ("_FORMAT", 0),
            ("_digest_of_sources", lambda: "of other schedules"),
        ],
    )
    def test_another_compiler_has_another_key(self, monkeypatch, name, value):
        before = key_of("scale_2", KERNEL, TARGET)
        monkeypatch.setattr(f"{kernel_objects.__name__}.{name}", value)
        assert key_of("scale_2", KERNEL, TARGET) != before

    def test_other_settings_of_tvm_have_another_key(self):
        before = key_of("scale_2", KERNEL, TARGET)
        with tvm.transform.PassContext(opt_level=0):
            level = key_of("scale_2", KERNEL, TARGET)
        with tvm.transform.PassContext(config={"tirx.disable_vectorize": True}):
            assert len({before, level, key_of("scale_2", KERNEL, TARGET)}) == 3

    def test_every_process_makes_the_same_key(self):
        script = (
            "import tvm; from turbo_tvm.compiler import kernel_objects as o, targets\n"
            "class R:\n    version = 1\n    def to_json(self): return '{}'\n"
            "print(o.key_of('k', o.Kernel('k', R()), targets.resolve('cpu')))"
        )
        keys = {
            subprocess.run(
                [sys.executable, "-c", script],
                env=os.environ | {"PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(keys) == 1 and len(keys.pop().strip()) == 64


class TestSources:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A package with two schedules and a file that builds them; the digest is made anew at each call."""
        monkeypatch.setattr(kernel_objects, "_PACKAGE", tmp_path)
        monkeypatch.setattr(kernel_objects, "_SOURCES", ("schedules", "recipe.py", "not there"))
        monkeypatch.setattr(kernel_objects, "_digest_of_sources", kernel_objects._digest_of_sources.__wrapped__)
        (tmp_path / "schedules" / "cpu").mkdir(parents=True)
        for name in ("schedules/linear.py", "schedules/cpu/norm.py", "recipe.py", "elsewhere.py"):
            (tmp_path / name).write_text(name)
        return tmp_path

    @pytest.mark.parametrize("name", ["schedules/linear.py", "schedules/cpu/norm.py", "recipe.py", "schedules/new.py"])
    def test_who_edits_a_schedule_gets_other_code(self, package, name):
        before = key_of("k", KERNEL, TARGET)
        (package / name).write_text("changed")
        assert key_of("k", KERNEL, TARGET) != before

    def test_a_renamed_file_counts_as_changed(self, package):
        before = key_of("k", KERNEL, TARGET)
        (package / "schedules/linear.py").rename(package / "schedules/product.py")
        assert key_of("k", KERNEL, TARGET) != before

    def test_other_files_do_not_matter(self, package):
        before = key_of("k", KERNEL, TARGET)
        (package / "elsewhere.py").write_text("changed")
        assert key_of("k", KERNEL, TARGET) == before

    def test_the_schedules_of_this_package_are_among_them(self):
        read: list[Path] = []
        original = Path.read_bytes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path: read.append(path) or original(path))
            kernel_objects._digest_of_sources.__wrapped__()
        names = {path.relative_to(kernel_objects._PACKAGE).as_posix() for path in read}
        assert {"schedules/cpu/linear.py", "ops/linear.py", "compiler/kernel_recipe.py"} <= names


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels", 1 << 20)


def run(libraries: list[tvm.runtime.Module], symbols: list[str], tmp_path: Path) -> np.ndarray:
    """Call kernels one after the other, from a module that they are linked with."""
    rows = relax.TensorType((3, 8), "float32")
    builder, x = relax.BlockBuilder(), relax.Var("x", rows)
    with builder.function("main", [x]):
        with builder.dataflow():
            y = x
            for symbol in symbols:
                y = builder.emit(relax.op.call_dps_packed(symbol, [y], out_ty=rows))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    mod = builder.finalize().with_attr("external_mods", libraries)
    tvm.compile(mod, target=targets.resolve("cpu")).export_library(str(tmp_path / "linked.so"))
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "linked.so")), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(np.ones((3, 8), "float32"))).numpy()


class TestObjects:
    def test_kernels_run_under_the_names_that_they_are_called_by(self, cache, tmp_path):
        kernels = {"twice": Kernel("scale", FakeRecipe(2.0)), "thrice": Kernel("scale", FakeRecipe(3.0))}
        libraries = KernelObjects(cache).libraries(kernels, targets.resolve("cpu"))
        assert run(libraries, ["twice", "thrice", "twice"], tmp_path).tolist() == [[12.0] * 8] * 3

    def test_a_kernel_that_is_kept_is_neither_built_nor_compiled(self, cache, tmp_path, monkeypatch):
        first, second = FakeRecipe(2.0), FakeRecipe(2.0)
        cold, warm = KernelObjects(cache), KernelObjects(cache)
        cold.libraries({"twice": Kernel("scale", first)}, targets.resolve("cpu"))
        monkeypatch.setattr(tvm.tirx, "build", None)
        libraries = warm.libraries({"twice": Kernel("scale", second)}, targets.resolve("cpu"))
        assert (len(first.built), len(second.built)) == (1, 0)
        assert (cold.compiled, cold.cached, warm.compiled, warm.cached) == (1, 0, 0, 1)
        assert run(libraries, ["twice"], tmp_path).tolist() == [[2.0] * 8] * 3

    def test_what_was_damaged_is_compiled_again_and_kept(self, cache, tmp_path):
        kernels, target = {"twice": Kernel("scale", FakeRecipe(2.0))}, targets.resolve("cpu")
        KernelObjects(cache).libraries(kernels, target)
        (entry,) = cache.directory.iterdir()
        whole = entry.read_bytes()
        entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        again = KernelObjects(cache)
        assert run(again.libraries(kernels, target), ["twice"], tmp_path).tolist() == [[2.0] * 8] * 3
        assert (again.compiled, again.cached) == (1, 0)
        assert entry.read_bytes() == whole  # the same kernel is the same code

    @pytest.mark.parametrize("directory", [None, Path("/proc/no/such/directory")])
    def test_without_a_cache_kernels_are_compiled_each_time(self, tmp_path, directory):
        recipe = FakeRecipe(2.0)
        for _ in range(2):
            objects = KernelObjects(KernelCache(directory, 1 << 20))
            libraries = objects.libraries({"twice": Kernel("scale", recipe)}, targets.resolve("cpu"))
            assert run(libraries, ["twice"], tmp_path).tolist() == [[2.0] * 8] * 3
        assert len(recipe.built) == 2

    def test_a_kernel_is_compiled_as_free_of_aliases(self):
        seen = []
        build = tvm.tirx.build
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tvm.tirx, "build", lambda mod, **options: seen.append(mod) or build(mod, **options))
            compile_kernel("twice", Kernel("scale", FakeRecipe(2.0)), targets.resolve("cpu"))
        assert bool(seen[0]["twice"].attrs["tirx.noalias"])
