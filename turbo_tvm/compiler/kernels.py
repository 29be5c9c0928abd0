"""The kernels of a model: from operators to PrimFuncs with names, and what each of them costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from turbo_tvm.artifact.manifest import KernelSpec, VariantSpec
from turbo_tvm.compiler.kernel_objects import Kernel
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.ops import Operator
from turbo_tvm.ops.call import operators
from turbo_tvm.ops.inputs import batch_shape
from turbo_tvm.ops.operand import dims
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.registry import Tiles, family_of

Tuned = Mapping[str, Sequence[Variant]]  # variants by the kernel's name


class Kernels:
    """Builds the kernels of a target; calling it is the `kernels` argument of `lower_kernels`.

    tuned: the variants of those kernels that are not built as they are by default.
    """

    def __init__(self, tiles: Tiles, tuned: Tuned | None = None):
        self.tiles = tiles
        self.tuned = tuned or {}

    def __call__(self, operator: Operator) -> tuple[str, tirx.PrimFunc]:
        """Return the name of an operator's kernel, unique for its parameters, and its PrimFunc."""
        kernel = self.kernel(operator)
        return kernel.name, kernel.build()

    def kernel(self, operator: Operator) -> Kernel:
        """Return an operator's kernel as data, in the variants that were tuned."""
        name = self.name(operator)
        return Kernel(name, self.recipe(operator), operator.overwritable(), tuple(self.tuned.get(name, ())))

    def name(self, operator: Operator) -> str:
        """Return what the kernel is called."""
        suffix = family_of(operator.without_graph(), self.tiles).suffix
        return "_".join(filter(None, (operator.kernel_name(), suffix)))

    def recipe(self, operator: Operator) -> KernelRecipe:
        """Return what the kernel is built from."""
        return KernelRecipe.of(operator, self.tiles)


def inventory(func: relax.Function, kernels: Kernels) -> tuple[KernelSpec, ...]:
    """Return the kernels that a function will call: how often, and what one call costs per token.

    A kernel on one row per sequence counts as nothing: next to the tokens there are few.
    """
    calls: Counter[str] = Counter()
    specs: dict[str, KernelSpec] = {}
    tokens = batch_shape(func)[0]
    for operator in operators(func):
        name = kernels.name(operator)
        calls[name] += 1
        if name not in specs:
            spec = _spec(name, operator, tokens)
            recipe = kernels.recipe(operator).to_json()
            specs[name] = replace(spec, recipe=recipe, variants=_variants(kernels, name))
    return tuple(replace(spec, calls=calls[name]) for name, spec in specs.items())


def _variants(kernels: Kernels, name: str) -> tuple[VariantSpec, ...]:
    return tuple(VariantSpec(dict(v.setting), v.max_rows or 0) for v in kernels.tuned.get(name, ()))


def _spec(name: str, operator: Operator, tokens: Any) -> KernelSpec:
    per_token = any(v.same_as(tokens) for v in tirx.analysis.undefined_vars(dims(operator.out)[0]))
    return KernelSpec(
        name,
        operator.NAME,
        0,
        operator.described(),
        operator.flops_per_token() if per_token else 0.0,
        operator.flops_per_pair(),
        operator.bytes_weights(),
        operator.bytes_per_token(tokens),
    )
