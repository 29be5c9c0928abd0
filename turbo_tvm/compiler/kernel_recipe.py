"""A kernel as data: which schedule it is built by, with which parameters; from the graph to code, and to a tuner.

A recipe can be written down. The manifest keeps that of every kernel, so that an artifact can be tuned without the
model that it was compiled from, and a tuner's log can say exactly what it measured.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from types import ModuleType
from typing import Any

from tvm import s_tir, tirx

from turbo_tvm.passes.plan_memory import OVERWRITES
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cuda.tiles import CudaTiles

Tiles = CpuTiles | CudaTiles
_ROOM = "turbo_tvm.schedules."
_WINGS = ("cpu.", "common.")  # that the name of a schedule leaves out


@dataclass(frozen=True)
class KernelRecipe:
    """schedule: module and function in `schedules`, such as "linear_amx.linear"; tiles: None where it takes none."""

    schedule: str
    tiles: Tiles | None
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(factory: Callable[..., tirx.PrimFunc], tiles: Tiles | None, options: Mapping[str, Any]) -> KernelRecipe:
        """The recipe of a schedule of ours called with these parameters."""
        name = f"{factory.__module__}.{factory.__name__}".removeprefix(_ROOM)
        for wing in _WINGS:
            name = name.removeprefix(wing)
        return KernelRecipe(name, tiles, tuple(sorted(options.items())))

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if self.schedule.startswith("cuda.") else "cpu"

    @property
    def version(self) -> int:
        """Of the kernel: measurements of another one say nothing about it. 0: it has nothing to tune."""
        return int(getattr(self._module, "VERSION", 0))

    @property
    def space(self) -> Space:
        """What can be tuned."""
        declared = getattr(self._module, "space", None)
        if declared is None:
            return Space()
        return declared(*self._tiles, **dict(self.options))

    def build(self, overwrites: Sequence[int] = (), variants: Sequence[Variant] = ()) -> tirx.PrimFunc:
        """The kernel, with these settings by rows; overwrites: see `kernels.overwritable`."""
        return _build(self, tuple(overwrites), tuple(variants))

    def to_json(self) -> str:
        """The recipe as text, always the same for the same recipe."""
        tiles = None if self.tiles is None else dataclasses.asdict(self.tiles)
        plain = {"schedule": self.schedule, "tiles": tiles, "options": {k: _plain(v) for k, v in self.options}}
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> KernelRecipe:
        """The recipe in a text that `to_json` made. ValueError for any other."""
        try:
            plain = json.loads(text)
            schedule, tiles = plain["schedule"], plain["tiles"]
            options = {name: _value(value) for name, value in plain["options"].items()}
            # by their fields: kernels on the host may prepare a GPU's weights
            kind = CpuTiles if "lanes" in (tiles or ()) else CudaTiles
            made = None if tiles is None else _record(kind, tiles)
            recipe = KernelRecipe(schedule, made, tuple(sorted(options.items())))
            inspect.signature(recipe._factory).bind(*recipe._tiles, **options)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError) as error:
            raise ValueError(f"no kernel of this turbo_tvm: {text[:200]!r} ({error})") from None
        return recipe

    @property
    def _module(self) -> ModuleType:
        module, _, _ = self.schedule.rpartition(".")
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"there is no schedule {self.schedule!r}")
        wings = [""] if module.startswith("cuda.") else _WINGS
        for wing in wings:
            if importlib.util.find_spec(_ROOM + wing + module) is not None:
                return importlib.import_module(_ROOM + wing + module)
        raise ValueError(f"there is no schedule {self.schedule!r}")

    @property
    def _factory(self) -> Callable[..., tirx.PrimFunc]:
        factory = getattr(self._module, self.schedule.rpartition(".")[2])
        makes = getattr(factory, "__annotations__", {}).get("return", "")
        if getattr(factory, "__module__", None) != self._module.__name__ or not str(makes).endswith("PrimFunc"):
            raise AttributeError(f"there is no schedule {self.schedule!r}")
        return factory

    @property
    def _tiles(self) -> tuple[Tiles, ...]:
        return () if self.tiles is None else (self.tiles,)


@lru_cache(maxsize=512)
def _build(recipe: KernelRecipe, overwrites: tuple[int, ...], variants: tuple[Variant, ...]) -> tirx.PrimFunc:
    """Parsing TVMScript takes up to a second, so models of one process share their kernels."""
    chosen = {"variants": variants} if variants else {}
    func = recipe._factory(*recipe._tiles, **dict(recipe.options), **chosen)
    return _rooted(func).with_attr(OVERWRITES, list(overwrites))


def _rooted(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function inside a root block, which TVM's analyses expect of every function that a graph calls."""
    if isinstance(func.body, s_tir.SBlockRealize):
        return func
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body))
    return tirx.PrimFunc(func.params, root, func.ret_type, func.attrs)


def _plain(value: Any) -> Any:
    if isinstance(value, RowFormat):
        return {"width": value.width, "dtype": value.dtype}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _record(kind: type[Any], plain: Mapping[str, Any]) -> Any:
    """A dataclass. TypeError unless these are its fields, of their types."""
    if {name: type(value).__name__ for name, value in plain.items()} != {f.name: f.type for f in fields(kind)}:
        raise TypeError(f"this is no {kind.__name__}")
    return kind(**plain)


def _value(plain: Any) -> Any:
    if isinstance(plain, dict):
        return _record(RowFormat, plain)
    return tuple(_value(item) for item in plain) if isinstance(plain, list) else plain
