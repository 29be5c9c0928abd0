"""A kernel as data: which family builds it, for which operator and tiles; from the graph to code, and to a tuner.

A recipe can be written down. The manifest keeps that of every kernel, so that an artifact can be tuned without the
model that it was compiled from, and a tuner's log can say exactly what it measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tvm import s_tir, tirx

from turbo_tvm.ops import Operator
from turbo_tvm.ops.codec import from_plain, to_plain
from turbo_tvm.ops.operator import OVERWRITES
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cuda.tiles import CudaTiles
from turbo_tvm.schedules.registry import KernelFamily, Tiles, candidates, family_of, named


@dataclass(frozen=True)
class KernelRecipe:
    """What a kernel is built from."""

    family: KernelFamily
    tiles: Tiles  # of the target
    operator: Operator  # without a graph

    @staticmethod
    def of(operator: Operator, tiles: Tiles) -> KernelRecipe:
        """Return the recipe of an operator's kernel. Raises LookupError where there is none."""
        alone = operator.without_graph()
        return KernelRecipe(family_of(alone, tiles), tiles, alone)

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.family.device

    @property
    def version(self) -> int:
        """Of the kernel's code: measurements of another one say nothing about it. 0: it has nothing to tune."""
        return self.family.version

    @property
    def space(self) -> Space:
        """What can be tuned."""
        return self.family.space_of(self.operator, self.tiles)

    def build(self, overwrites: Sequence[int] = (), variants: Sequence[Variant] = ()) -> tirx.PrimFunc:
        """Return the kernel, with these settings by rows. overwrites: see `Operator.overwritable`."""
        return _build(self, tuple(overwrites), tuple(variants))

    def to_json(self) -> str:
        """Return the recipe as text, always the same for the same recipe."""
        plain = {"family": self.family.name, "tiles": dataclasses.asdict(self.tiles), **to_plain(self.operator)}
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> KernelRecipe:
        """Return the recipe in a text that `to_json` made. Raises ValueError for any other."""
        try:
            plain = json.loads(text)
            family, tiles = named(plain.pop("family")), _tiles(plain.pop("tiles"))
            operator = from_plain(plain)
            if family not in candidates(type(operator), tiles):
                raise ValueError(f"{family.name} is no kernel of {operator.NAME} for these tiles")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no kernel of this turbo_tvm: {text[:200]!r} ({error})") from None
        return KernelRecipe(family, tiles, operator)


@lru_cache(maxsize=512)
def _build(recipe: KernelRecipe, overwrites: tuple[int, ...], variants: tuple[Variant, ...]) -> tirx.PrimFunc:
    """Return the kernel; parsing TVMScript takes up to a second, so models of one process share their kernels."""
    func = recipe.family.build(recipe.operator, recipe.tiles, variants)
    return _rooted(func).with_attr(OVERWRITES, list(overwrites))


def _rooted(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the function inside a root block, which TVM's analyses expect of every function that a graph calls."""
    if isinstance(func.body, s_tir.SBlockRealize):
        return func
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body))
    return tirx.PrimFunc(func.params, root, func.ret_type, func.attrs)


def _tiles(plain: Mapping[str, Any]) -> Tiles:
    """Return the tiles of one device. Raises TypeError unless these are the fields of such, of their types."""
    for kind in (CpuTiles, CudaTiles):
        if {name: type(value).__name__ for name, value in plain.items()} == {
            f.name: f.type for f in dataclasses.fields(kind)
        }:
            return kind(**plain)
    raise TypeError(f"no tiles: {plain!r}")
