"""Store activations and multiply in bf16 or fp16.

    y (t, R, 768) f32 = linear(x (t, R, 768) f32, w, b)      --> y u16 = linear(x u16, w, b)
    h f32 = embedding(ids, table f32)                        --> h u16 = embedding(ids, turbo.cast_weight(table))

bf16 numbers travel as the uint16 with their bits: TVM's LLVM code generator has no bf16 vectors. What a kernel
computes is accumulated in fp32, and norms, softmax and activations are fp32 inside. Outputs of the model stay fp32, and
so does everything that TVM's own operators read or write; a product or an attention that reads such a value gets a
`turbo.cast_rows` in front. Biases and tables of position biases stay fp32: they are small. So do norms' gains, but for
kernels that read them with every row from beyond a cache (`vectors`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import ir, relax

from turbo_tvm.errors import CompileError
from turbo_tvm.ops import Attention, CastRows, CastWeight, Embedding, Gate, L2Normalize, Linear, Norm, Operator, Rotary
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.ops.formats import Format
from turbo_tvm.ops.operand import dims
from turbo_tvm.passes.rewriter import Rewriter, read_by_others, shape_of

_STORED = (Linear, Attention, Norm, L2Normalize, Embedding, Gate, Rotary)  # kernels that can write narrow rows


def lower_precision(
    mod: ir.IRModule, function: str, storage: Format, pairs: bool = True, vectors: bool = False
) -> ir.IRModule:
    """Store the operands of products, and the rows between operators, in a narrow format.

    storage: that format, bf16 or fp16. pairs: kernels multiply pairs of numbers; CompileError if a width is odd.
    vectors: norms' gains and shifts too.
    """
    return _LowerPrecision(mod, function, storage, pairs, vectors).run()


class _LowerPrecision(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, storage: Format, pairs: bool, vectors: bool):
        super().__init__(mod, function)
        self.format, self.pairs, self.vectors = storage, pairs, vectors
        self._fixed = read_by_others(self.func)
        self._lowered: dict[relax.Expr, relax.Var] = {}

    def rules(self):
        return (self._lower,)

    def _lower(self, call: relax.Call) -> relax.Expr | None:
        found = match(call, Operator)
        if not isinstance(found, _STORED):
            return None
        changed: dict[str, Any] = self._operands(found)
        if self.vectors and isinstance(found, Norm | Linear | Embedding):
            vectors = {"gamma": found.gamma, "beta": found.beta}
            changed |= {name: self._weight(vector) for name, vector in vectors.items() if vector is not None}
        if self.current not in self._fixed:
            changed["out"] = relax.TensorType(dims(found.out), self.format.storage)
        return to_call(replace(found, **changed))

    def _operands(self, found: Operator) -> dict[str, Any]:
        """Return what a kernel multiplies or looks up, in the narrow format."""
        if isinstance(found, Linear) and len(shape_of(found.weight)) == 2:
            self._check_even(int(shape_of(found.weight)[1]), "a product's")
            return {"x": self._rows(found.x)}
        if isinstance(found, Attention):
            self._check_even(found.head_dim, "an attention head's")
            return {"q": self._rows(found.q), "k": self._rows(found.k), "v": self._rows(found.v)}
        if isinstance(found, Embedding):
            return {"tables": tuple(self._weight(table) for table in found.tables)}
        return {}

    def _rows(self, x: relax.Expr) -> relax.Expr:
        return self._converted(x, lambda out: CastRows(x=x, out=out))

    def _weight(self, weight: relax.Expr) -> relax.Expr:
        return self._converted(weight, lambda out: CastWeight(weight=weight, out=out))

    def _converted(self, x: relax.Expr, cast: Callable[[relax.Type], Operator]) -> relax.Expr:
        """Return the value in the narrow format; shared by all its readers."""
        if str(x.ty.dtype) == self.format.storage:
            return x
        if x not in self._lowered:
            self._lowered[x] = self.emit(to_call(cast(relax.TensorType(dims(x), self.format.storage))))
        return self._lowered[x]

    def _check_even(self, columns: int, what: str) -> None:
        if self.pairs and columns % 2:
            raise CompileError(
                f"bf16 multiplies pairs, and {what} width of {columns} is odd: compile with precision='fp32'"
            )
