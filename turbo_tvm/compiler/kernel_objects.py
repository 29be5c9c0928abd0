"""From a kernel to its object code, which is compiled by itself, once: a cache keeps it for the next model.

A kernel as data (`Kernel`) says everything that its code depends on, so one that the cache knows is neither parsed nor
compiled. TVM links the objects with the rest of a model as it does any external library.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import tvm
import tvm_ffi
from tvm import tirx

from turbo_tvm.compiler.kernel_cache import KernelCache
from turbo_tvm.schedules.common.space import Variant

_FORMAT = 1  # of keys and code: raise it when this file makes other code of the same kernel
_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = ("schedules", "ops", "compiler/kernel_recipe.py", "compiler/kernel_objects.py")


class Recipe(Protocol):
    """A schedule of ours and its parameters: what `Kernel` needs of a `KernelRecipe`."""

    @property
    def version(self) -> int:
        """Of the schedule."""

    def to_json(self) -> str:
        """Return the recipe as text, always the same for the same recipe."""

    def build(self, overwrites: tuple[int, ...], variants: tuple[Variant, ...]) -> tirx.PrimFunc:
        """Return the kernel in TVM's terms."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a model, before it is built."""

    name: str  # kernels of one name differ in `overwrites` at most
    recipe: Recipe
    overwrites: tuple[int, ...] = ()  # positions of the tensors that may be the memory of the output
    variants: tuple[Variant, ...] = ()  # settings by the number of rows, in place of the schedule's own

    def build(self) -> tirx.PrimFunc:
        """Return the kernel in TVM's terms."""
        return self.recipe.build(self.overwrites, self.variants)


class KernelObjects:
    """Object code of kernels, from the cache where that has it."""

    def __init__(self, cache: KernelCache):
        self.cache = cache
        self.compiled = 0  # how many kernels it did not have
        self.cached = 0  # how many it had

    def libraries(self, kernels: Mapping[str, Kernel], target: tvm.target.Target) -> list[tvm.runtime.Module]:
        """Return the kernels' code for a CPU, to link with a model that calls them by these names."""
        with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
            path = Path(directory) / "kernel.o"
            made = []
            for symbol, kernel in kernels.items():
                path.write_bytes(self._code(symbol, kernel, target))
                made.append(tvm.runtime.load_static_library(str(path), [symbol]))
            return made

    def _code(self, symbol: str, kernel: Kernel, target: tvm.target.Target) -> bytes:
        key = key_of(symbol, kernel, target)
        known = self.cache.get(key)
        if known is not None:
            self.cached += 1
            return known
        code = compile_kernel(symbol, kernel, target)
        self.compiled += 1
        self.cache.put(key, code)
        return code


def key_of(symbol: str, kernel: Kernel, target: tvm.target.Target) -> str:
    """Return the sha256 of everything that a kernel's object code depends on."""
    context = tvm.transform.PassContext.current()
    parts = {
        "format": _FORMAT,
        "symbol": symbol,
        "recipe": kernel.recipe.to_json(),
        "version": kernel.recipe.version,
        "overwrites": kernel.overwrites,
        "variants": [asdict(variant) for variant in kernel.variants],
        "target": str(target),
        "tvm": [tvm.__version__, tvm_ffi.__version__],
        "context": [int(context.opt_level), str(context.config)],
        "sources": _digest_of_sources(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compile_kernel(symbol: str, kernel: Kernel, target: tvm.target.Target) -> bytes:
    """Return an object file in which the kernel has that name."""
    # TVM compiles a whole module by the mark of one function, and marks nothing by itself
    func = kernel.build().with_attr({"global_symbol": symbol, "tirx.noalias": True})
    module = tvm.tirx.build(tvm.IRModule({symbol: func}), target=target, pipeline="default")
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
        path = Path(directory) / "kernel.o"
        module.write_to_file(str(path))
        return path.read_bytes()


@lru_cache(maxsize=1)
def _digest_of_sources() -> str:
    """Return the sha256 of the code that turns recipes into kernels: whoever edits a schedule gets what it says now."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        place = _PACKAGE / source
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
