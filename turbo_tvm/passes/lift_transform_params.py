"""Lift everything that depends on weights alone into a function of its own, which the compiler runs once.

    encode(x, w)      { p = pack_weight(concat(w, w)); linear(x, p) }
        --> encode(x, p)          { linear(x, p) }
            transform_weights(w)  { (pack_weight(concat(w, w)),) }

TVM's LiftTransformParams does nearly this, but leaves expressions of constants behind and renames what it lifts; here
the packed weights keep the name of the first weight they were made from.
"""

from __future__ import annotations

import itertools

from tvm import ir, relax

from turbo_tvm.ops.entry import TRANSFORM_WEIGHTS
from turbo_tvm.ops.inputs import input_params, weight_params
from turbo_tvm.passes.rewriter import builder_without, has_symbolic_shape, substitute, tidy


def lift_transform_params(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Split a function into itself, on inputs and prepared weights, and `transform_weights`, from weights to those."""
    return _LiftTransformParams(mod, function).run()


class _LiftTransformParams:
    def __init__(self, mod: ir.IRModule, function: str):
        self.mod, self.name = mod, function
        self.func: relax.Function = mod[function]
        self.weights = weight_params(self.func)
        self.bindings = [b for block in self.func.body.blocks for b in block.bindings]
        self.source: dict[relax.Var, str] = {w: w.name for w in self.weights}
        self._mark()

    def _mark(self) -> None:
        """Name every variable that depends on weights alone after the first weight it was made from."""
        for binding in self.bindings:
            free = relax.analysis.free_vars(binding.value)
            # A dimension of the input is no weight, nor is what has one in its shape.
            if all(v in self.source for v in free) and not has_symbolic_shape(binding.var):
                self.source[binding.var] = next((self.source[v] for v in free), "constant")

    def run(self) -> ir.IRModule:
        needed = self._needed()
        builder = builder_without(self.mod, self.name)
        with builder.function(TRANSFORM_WEIGHTS, self.weights):
            with builder.dataflow():
                new = self._emit(builder, [b for b in self.bindings if b.var in self.source], {})
                out = builder.emit_output(relax.Tuple([substitute(v, new) for v in needed]))
            builder.emit_func_output(out)
        prepared = {v: relax.Var(name, v.ty) for v, name in zip(needed, self._names(needed), strict=True)}
        params = [*input_params(self.func), *prepared.values()]
        with builder.function(self.name, params, attrs=dict(self.func.attrs)):
            with builder.dataflow():
                rest = [b for b in self.bindings if b.var not in self.source]
                new = self._emit(builder, rest, dict(prepared))
                out = builder.emit_output(substitute(self.func.body.body, new))
            builder.emit_func_output(out)
        return tidy(builder.finalize())

    def _needed(self) -> list[relax.Var]:
        """Return the prepared weights that the function still reads, in order of first use."""
        found: dict[relax.Var, None] = {}
        for binding in self.bindings:
            if binding.var not in self.source:
                found.update(dict.fromkeys(v for v in relax.analysis.free_vars(binding.value) if v in self.source))
        return list(found)

    def _emit(self, builder: relax.BlockBuilder, bindings: list, new: dict) -> dict:
        for binding in bindings:
            value = substitute(binding.value, new)
            new[binding.var] = value if isinstance(value, relax.Tuple) else builder.emit(value)
        return new

    def _names(self, needed: list[relax.Var]) -> list[str]:
        """One name per prepared weight: its source's, with the first number that makes it unique."""
        names: list[str] = []
        for var in needed:
            source = self.source[var]
            candidates = (f"{source}.{number}" if number else source for number in itertools.count())
            names.append(next(name for name in candidates if name not in names))
        return names
