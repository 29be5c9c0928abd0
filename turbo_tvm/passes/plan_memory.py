"""Let the executor supply every intermediate and output tensor of a function, and say when each of them lives.

    encode(...) { t = R.builtin.alloc_tensor((tiles, 12, 768)); kernel(x, t) }
        --> encode(..., buffer_0) { kernel(x, buffer_0) }

Runs on the lowered, ordered function, after CallTIRRewrite. A step is a call of a kernel. A tensor lives from the step
that writes it to the last one that reads it, through views of it; an output to the end. Sizes stay symbolic: a
dimension is a product of numbers and of what a batch says about itself (`symbols`), so that placing the tensors is left
to the runtime, which does it once per shape (`runtime/memory/planner.py`). Tensors of any other shape or type are left
to TVM's own allocation.

In place: a kernel may overwrite an input that has no later reader, if it is of the same type and the kernel allows it:
its attribute `OVERWRITES` lists such parameters (of a kernel outside the module, `overwrites`), and TVM's element-wise
kernels allow all of theirs. The runtime may then give both tensors one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.ir import Expr

from turbo_tvm import tvm_compat
from turbo_tvm.ops.inputs import Inputs, batch_shape
from turbo_tvm.ops.operand import dims
from turbo_tvm.ops.operator import OVERWRITES
from turbo_tvm.passes.remove_padding import sequence_tiles
from turbo_tvm.passes.rewriter import is_call, same_shape, shape_of, substitute

# What the runtime can name; TVM keeps tensors of other types.
DTYPES = ("float64", "float32", "float16", "int64", "int32", "uint16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Buffer:
    """One parameter that is added: a tensor that the executor supplies.

    shape: a product per dimension, such as "token_tiles", "4" or "12*batch". first, last: the steps, inclusive, between
    which it must keep its place; an output's last is the number of steps. replaces: the buffer, last read in the step
    that writes this one, whose place this one may take.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    first: int
    last: int
    replaces: str | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What a function needs of memory."""

    buffers: tuple[Buffer, ...] = ()  # its last parameters, in order
    steps: tuple[str, ...] = ()  # the names of the kernels that it calls, in order


def plan_memory(
    mod: ir.IRModule,
    function: str,
    symbols: Mapping[str, Expr],
    overwrites: Mapping[str, Sequence[int]] | None = None,
) -> tuple[ir.IRModule, MemoryPlan]:
    """Return the module with the function taking buffers as last parameters, and what the runtime must know of them.

    symbols: what dimensions may be made of, by the names that the runtime knows them by. overwrites: of kernels outside
    the module, by name, the positions of parameters that may be the memory of their output.
    """
    return _PlanMemory(mod, function, symbols, overwrites or {}).run()


def plan_batch_memory(
    mod: ir.IRModule, function: str, row_tile: int | None, overwrites: Mapping[str, Sequence[int]] | None = None
) -> tuple[ir.IRModule, MemoryPlan]:
    """Plan the memory of a function by what a batch says of itself.

    row_tile: rows per tile of the target's layout; None to leave all memory to TVM.
    """
    if row_tile is None:
        return mod, MemoryPlan()
    return plan_memory(mod, function, _symbols(mod[function], row_tile), overwrites)


def _symbols(func: relax.Function, row_tile: int) -> dict[str, Expr]:
    """Return what sizes are made of, by `manifest.SYMBOLS`: the first input's dimensions, and what follows."""
    first, second = batch_shape(func)[:2]
    inputs = Inputs.of(func)
    if inputs.are_packed:
        (boundaries,) = dims(inputs.cu_seqlens)
        return {"token_tiles": first, "sequence_tiles": sequence_tiles(boundaries, row_tile)}
    return {"batch": first, "length": second, "row_tiles": (first * second + row_tile - 1) // row_tile}


@dataclass
class _Life:
    """What is known of an allocation that is planned."""

    name: str
    var: relax.Var
    shape: tuple[str, ...]
    first: int = -1
    last: int = -1
    replaces: str | None = None


class _PlanMemory:
    def __init__(
        self, mod: ir.IRModule, function: str, symbols: Mapping[str, Expr], overwrites: Mapping[str, Sequence[int]]
    ):
        self.mod = mod
        self.symbols = symbols
        self.overwrites = overwrites
        self.var, self.func = mod.get_global_var(function), mod[function]
        self.bindings = [b for block in self.func.body.blocks for b in block.bindings]
        self.views: dict[relax.Var, list[relax.Var]] = {}  # view or tuple -> what it looks at
        self.lives: dict[relax.Var, _Life] = {}
        self.calls: list[tuple[int, relax.Call]] = []  # step, call of a kernel
        self.steps: list[str] = []

    def run(self) -> tuple[ir.IRModule, MemoryPlan]:
        self._find_lives()
        for step, call in self.calls:
            self._overwrite(step, call)
        lives = list(self.lives.values())
        params = {life.var: relax.Var(life.name, life.var.ty) for life in lives}
        buffers = [Buffer(v.name, v.shape, str(v.var.ty.dtype), v.first, v.last, v.replaces) for v in lives]
        return self._rebuild(params), MemoryPlan(tuple(buffers), tuple(self.steps))

    def _find_lives(self) -> None:
        for binding in self.bindings:
            var, value = binding.var, binding.value
            read = [root for v in relax.analysis.free_vars(value) for root in self._roots(v)]
            if is_call(value, "builtin.alloc_tensor"):
                shape = self._shape(var)
                if shape is not None and str(var.ty.dtype) in DTYPES:
                    self.lives[var] = _Life(f"buffer_{len(self.lives)}", var, shape)
            elif tvm_compat.is_view(value):
                self.views[var] = read
            else:
                self._use(read)
                self._count(value)
        for var in relax.analysis.free_vars(self.func.body.body):
            for root in self._roots(var):
                self._use([root])

    def _use(self, tensors: list[relax.Var]) -> None:
        for life in (self.lives[v] for v in tensors if v in self.lives):
            life.first = len(self.steps) if life.first < 0 else life.first
            life.last = len(self.steps)

    def _count(self, value: relax.Expr) -> None:
        """A kernel makes a step; what the VM does itself belongs to the step that follows."""
        if not isinstance(value, relax.Call):
            return
        name = _callee(value)
        if name is not None:
            self.calls.append((len(self.steps), value))
            self.steps.append(name)

    def _overwrite(self, step: int, call: relax.Call) -> None:
        """Note that the output of a kernel may take the place of an input that dies there, if the kernel allows it."""
        *inputs, out = call.args or [None]
        made = self.lives.get(out)
        if made is None or made.first != step:
            return
        roots = [self._roots(a) if isinstance(a, relax.Var) else [] for a in inputs]
        for position in self._overwritten(call, len(inputs)):
            if len(roots[position]) != 1 or roots[position][0] not in self.lives:
                continue
            source = self.lives[roots[position][0]]
            alike = (source.shape, source.var.ty.dtype) == (made.shape, made.var.ty.dtype)
            alone = sum(source.var in found for found in roots) == 1
            if alike and alone and source.first < step and source.last == step:
                made.replaces = source.name
                return

    def _overwritten(self, call: relax.Call, inputs: int) -> Sequence[int]:
        """Return the positions of the inputs that the called kernel's output may overwrite."""
        if isinstance(call.op, relax.ExternFunc):
            return self.overwrites.get(str(call.op.global_symbol), ())
        kernel = self.mod[call.op]
        return _overwrites(kernel, inputs) if isinstance(kernel, tirx.PrimFunc) else ()

    def _rebuild(self, new: dict[relax.Var, relax.Var]) -> ir.IRModule:
        kept = [relax.VarBinding(b.var, substitute(b.value, new)) for b in self.bindings if b.var not in new]
        body = relax.SeqExpr([relax.BindingBlock(kept)], substitute(self.func.body.body, new))
        func = relax.Function(
            [*self.func.params, *new.values()], body, self.func.ret_ty, is_pure=False, attrs=self.func.attrs
        )
        mod = ir.IRModule(dict(self.mod.functions_items()), attrs=self.mod.attrs)
        mod.update_func(self.var, func)
        return relax.transform.Normalize()(mod)

    def _roots(self, var: relax.Var) -> list[relax.Var]:
        """The tensors whose memory a variable looks at: itself, unless it is a view or a tuple."""
        return [root for seen in self.views[var] for root in self._roots(seen)] if var in self.views else [var]

    def _shape(self, var: relax.Var) -> tuple[str, ...] | None:
        dims = [self._product(d) for d in shape_of(var)]
        return tuple(d for d in dims if d is not None) if dims and None not in dims else None

    def _product(self, dim: int | Expr) -> str | None:
        """A dimension as a product of symbols and a number; None if it is no such thing."""
        factors = self._factors(dim)
        if factors is None:
            return None
        number, names = factors
        return "*".join([*([str(number)] if number != 1 or not names else []), *sorted(names)])

    def _factors(self, dim: int | Expr) -> tuple[int, list[str]] | None:
        if isinstance(dim, int | tirx.IntImm):
            return (int(dim), []) if int(dim) > 0 else None
        for name, expression in self.symbols.items():
            if same_shape([dim], [expression]):
                return 1, [name]
        if not isinstance(dim, tirx.Mul):
            return None
        left, right = self._factors(dim.a), self._factors(dim.b)
        return (left[0] * right[0], [*left[1], *right[1]]) if left and right else None


def _callee(call: relax.Call) -> str | None:
    """Return the name of the kernel that is called, in the module or outside; None if the VM does this itself."""
    if isinstance(call.op, ir.GlobalVar):
        return call.op.name_hint
    return tvm_compat.calls_outside(call)


def _overwrites(kernel: tirx.PrimFunc, inputs: int) -> list[int]:
    """Positions of the inputs that a kernel's output may overwrite."""
    attrs = dict(kernel.attrs or {})
    if OVERWRITES in attrs:
        return [int(i) for i in attrs[OVERWRITES]]
    return list(range(inputs)) if tvm_compat.is_elementwise(attrs) else []
