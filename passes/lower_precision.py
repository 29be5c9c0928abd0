"""Store activations and multiply in bf16.

    y (t, R, 768) f32 = linear(x (t, R, 768) f32, w, b)      --> y u16 = linear(x u16, w, b)
    h f32 = embedding(ids, table f32)                        --> h u16 = embedding(ids, turbo.table_to_bf16(table))

bf16 numbers travel as the uint16 with their bits: TVM's LLVM code generator has no bf16 vectors. What a kernel
computes is accumulated in fp32, and norms, softmax and activations are fp32 inside. Outputs of the model stay fp32, and
so does everything that TVM's own operators read or write; a product or an attention that reads such a value gets a
`turbo.to_bf16` in front. Biases, norms' gains and tables of position biases stay fp32: they are small.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.errors import CompileError
from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import Rewriter, dims_of, shape_of

BF16 = "uint16"
_STORED = frozenset(["linear", "attention", "norm", "normalize", "embedding"])  # kernels that can write bf16


def lower_precision(mod: ir.IRModule) -> ir.IRModule:
    """bf16 for the products and the rows between composites of `main`. Raises CompileError if a width is odd."""
    return _LowerPrecision(mod).run()


class _LowerPrecision(Rewriter):
    def __init__(self, mod: ir.IRModule):
        super().__init__(mod)
        self._fixed = composite.read_by_operators(self.func)
        self._lowered: dict[relax.Expr, relax.Var] = {}

    def rules(self):
        return (self._lower,)

    def _lower(self, call: relax.Call) -> relax.Expr | None:
        fused = composite.match(call)
        if fused is None or fused.name not in _STORED:
            return None
        tensors, out = list(fused.tensors), call.ty_args[0]
        if fused.name == "linear" and len(shape_of(tensors[1])) == 2:
            _check_even(int(shape_of(tensors[1])[1]), "a product's")
            tensors[0] = self._rows(tensors[0])
        elif fused.name == "attention":
            _check_even(int(fused.attrs["head_dim"]), "an attention head's")
            tensors[:3] = [self._rows(x) for x in tensors[:3]]
        elif fused.name == "embedding":
            count = int(fused.attrs["tables"])
            tensors[count : 2 * count] = [self._table(x) for x in tensors[count : 2 * count]]
        if self.current not in self._fixed:
            out = relax.TensorType(dims_of(out), BF16)
        return composite.Composite(fused.name, tuple(tensors), fused.attrs).call(out)

    def _rows(self, x: relax.Expr) -> relax.Expr:
        return x if str(x.ty.dtype) == BF16 else self._converted("to_bf16", x)

    def _table(self, x: relax.Expr) -> relax.Expr:
        if str(x.ty.dtype) == BF16:
            return x
        rows, columns = shape_of(x)
        return self._converted("table_to_bf16", x, rows=int(rows), columns=int(columns))

    def _converted(self, name: str, x: relax.Expr, **attrs: int) -> relax.Var:
        """The value in bf16; shared by all its readers."""
        if x not in self._lowered:
            self._lowered[x] = self.emit(composite.make(name, [x], relax.TensorType(dims_of(x.ty), BF16), **attrs))
        return self._lowered[x]


def _check_even(columns: int, what: str) -> None:
    if columns % 2:
        raise CompileError(
            f"bf16 multiplies pairs, and {what} width of {columns} is odd: compile with precision='fp32'"
        )
