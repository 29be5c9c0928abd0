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

from tvm import ir, relax

from turbo_tvm.errors import CompileError
from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import Rewriter, dims_of, shape_of

BF16 = "uint16"
_STORED = frozenset(
    ["linear", "attention", "norm", "normalize", "embedding", "gate", "rotary"]
)  # kernels that can write bf16


def lower_precision(mod: ir.IRModule, storage: str = BF16, pairs: bool = True, vectors: bool = False) -> ir.IRModule:
    """16-bit numbers for the products and the rows between composites of `main`.

    storage: "uint16" for bf16, or "float16". pairs: kernels multiply pairs of numbers; CompileError if a width is odd.
    vectors: norms' gains and shifts too.
    """
    return _LowerPrecision(mod, storage, pairs, vectors).run()


class _LowerPrecision(Rewriter):
    def __init__(self, mod: ir.IRModule, storage: str, pairs: bool, vectors: bool):
        super().__init__(mod)
        self.storage, self.pairs, self.vectors = storage, pairs, vectors
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
            self._check_even(int(shape_of(tensors[1])[1]), "a product's")
            tensors[0] = self._rows(tensors[0])
        elif fused.name == "attention":
            self._check_even(int(fused.attrs["head_dim"]), "an attention head's")
            tensors[:3] = [self._rows(x) for x in tensors[:3]]
        elif fused.name == "embedding":
            count = int(fused.attrs["tables"])
            tensors[count : 2 * count] = [self._weight(x) for x in tensors[count : 2 * count]]
        if self.vectors and (fused.name == "norm" or fused.attrs.get("norm_eps") is not None):
            count = 1 if fused.attrs.get("kind") == "rms" else 2  # a gain, and a shift
            tensors[-count:] = [self._weight(x) for x in tensors[-count:]]
        if self.current not in self._fixed:
            out = relax.TensorType(dims_of(out), self.storage)
        return composite.Composite(fused.name, tuple(tensors), fused.attrs).call(out)

    def _rows(self, x: relax.Expr) -> relax.Expr:
        return self._converted("cast_rows", x)

    def _weight(self, x: relax.Expr) -> relax.Expr:
        return self._converted("cast_weight", x, shape=[int(d) for d in shape_of(x)])

    def _converted(self, name: str, x: relax.Expr, **attrs: list[int]) -> relax.Expr:
        """The value in 16 bits; shared by all its readers."""
        if str(x.ty.dtype) == self.storage:
            return x
        if x not in self._lowered:
            out = relax.TensorType(dims_of(x.ty), self.storage)
            self._lowered[x] = self.emit(composite.make(name, [x], out, **attrs))
        return self._lowered[x]

    def _check_even(self, columns: int, what: str) -> None:
        if self.pairs and columns % 2:
            raise CompileError(
                f"bf16 multiplies pairs, and {what} width of {columns} is odd: compile with precision='fp32'"
            )
