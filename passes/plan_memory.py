"""Let the executor supply every intermediate and output tensor of `main`.

    main(...) { t = R.builtin.alloc_tensor((tiles, 12, 768)); kernel(x, t) }
        --> main(..., buffer_0_768) { kernel(x, buffer_0_768) }

Runs on the lowered, ordered function, after CallTIRRewrite. Tensors of packed rows differ in nothing but their column
count, so their lifetimes are known here and their sizes are `rows x columns`. Each is given a slot: one piece of memory
per slot, as wide as the widest tensor that ever lives in it. Two tensors that are alive together never share a slot; an
output's slot is never reused. Tensors of any other shape are left to TVM's own allocation.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import ir, relax

from turbo_tvm.passes.normalize import same_shape
from turbo_tvm.passes.remove_padding import sequence_tiles
from turbo_tvm.passes.rewriter import is_call, shape_of, substitute


@dataclass(frozen=True)
class Buffer:
    """One parameter added to `main`: a tensor that the executor supplies.

    slot: which piece of memory; kind: "token" or "sequence" rows; columns: 0 for a tensor of rank 2.
    """

    slot: int
    kind: str
    columns: int
    dtype: str

    @property
    def name(self) -> str:
        return f"buffer_{self.slot}_{self.columns}_{self.dtype}"


def plan_memory(mod: ir.IRModule) -> tuple[ir.IRModule, tuple[Buffer, ...]]:
    """The module with `main` taking its buffers as last parameters, and those buffers in that order."""
    return _PlanMemory(mod).run()


class _PlanMemory:
    def __init__(self, mod: ir.IRModule):
        self.mod = mod
        self.var, self.func = mod.get_global_var("main"), mod["main"]
        self.bindings = [b for block in self.func.body.blocks for b in block.bindings]
        self.tiles = shape_of(self.func.params[0])[0]
        self.row_tile = shape_of(self.func.params[0])[1]
        self.sequence_tiles = self._sequence_tiles()
        self.views: dict[relax.Var, list[relax.Var]] = {}  # view or tuple -> what it looks at
        self.widths: dict[tuple[str, str], dict[int, int]] = {}  # (kind, dtype) -> slot -> columns
        self.slots = 0

    def _sequence_tiles(self) -> list:
        boundaries = [shape_of(p)[0] for p in self.func.params if p.name == "cu_seqlens"]
        return [sequence_tiles(count, self.row_tile) for count in boundaries]

    def run(self) -> tuple[ir.IRModule, tuple[Buffer, ...]]:
        last = self._last_uses()
        params: dict[Buffer, relax.Var] = {}
        new: dict[relax.Var, relax.Expr] = {}
        free: dict[tuple[str, str], set[int]] = {}
        live: dict[relax.Var, Buffer] = {}
        kept: list[relax.Binding] = []
        for step, binding in enumerate(self.bindings):
            buffer = self._assign(binding, free)
            if buffer is None:
                kept.append(relax.VarBinding(binding.var, substitute(binding.value, new)))
            else:
                params.setdefault(buffer, relax.Var(buffer.name, binding.var.ty))
                new[binding.var] = params[buffer]
                live[binding.var] = buffer
            for var in [v for v in live if last[v] <= step]:
                done = live.pop(var)
                free[(done.kind, done.dtype)].add(done.slot)
        return self._rebuild(kept, params, new), tuple(params)

    def _rebuild(self, kept: list, params: dict[Buffer, relax.Var], new: dict) -> ir.IRModule:
        body = relax.SeqExpr([relax.BindingBlock(kept)], substitute(self.func.body.body, new))
        func = relax.Function(
            [*self.func.params, *params.values()],
            body,
            self.func.ret_ty,
            is_pure=False,
            attrs=self.func.attrs,
        )
        mod = ir.IRModule(dict(self.mod.functions_items()), attrs=self.mod.attrs)
        mod.update_func(self.var, func)
        return relax.transform.Normalize()(mod)

    def _roots(self, var: relax.Var) -> list[relax.Var]:
        """The tensors whose memory a variable looks at: itself, unless it is a view or a tuple."""
        return [root for seen in self.views[var] for root in self._roots(seen)] if var in self.views else [var]

    def _last_uses(self) -> dict[relax.Var, int]:
        """The step of the last binding that reads each tensor, through views of it; outputs live for ever."""
        last: dict[relax.Var, int] = {}
        for step, binding in enumerate(self.bindings):
            read = [root for v in relax.analysis.free_vars(binding.value) for root in self._roots(v)]
            last.update(dict.fromkeys([*read, binding.var], step))
            if self._is_view(binding.value):
                self.views[binding.var] = read
        for var in relax.analysis.free_vars(self.func.body.body):
            last.update(dict.fromkeys(self._roots(var), len(self.bindings)))
        return last

    def _is_view(self, value: relax.Expr) -> bool:
        if isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem) or is_call(value, "reshape"):
            return True
        return (
            isinstance(value, relax.Call)
            and isinstance(value.op, relax.ExternFunc)
            and "reshape" in str(value.op.global_symbol)
        )

    def _assign(self, binding: relax.Binding, free: dict[tuple[str, str], set[int]]) -> Buffer | None:
        """A slot for an allocation: a free one that is wide enough, else the widest free one, else a new one."""
        found = self._rows(binding)
        if found is None:
            return None
        kind, columns, dtype = found
        pool = free.setdefault((kind, dtype), set())
        widths = self.widths.setdefault((kind, dtype), {})
        need = max(columns, 1)
        wide = [s for s in pool if widths[s] >= need]
        if wide:
            slot = min(wide, key=lambda s: (widths[s], s))
        elif pool:
            slot = max(pool, key=lambda s: (widths[s], -s))
        else:
            slot, self.slots = self.slots, self.slots + 1
        pool.discard(slot)
        widths[slot] = max(widths.get(slot, 0), need)
        return Buffer(slot, kind, columns, dtype)

    def _rows(self, binding: relax.Binding) -> tuple[str, int, str] | None:
        """(kind, columns, dtype) of an allocation of packed rows; None for any other binding."""
        if not is_call(binding.value, "builtin.alloc_tensor"):
            return None
        first, *rest = shape_of(binding.var)
        if not rest or rest[0] != self.row_tile or len(rest) > 2 or not all(isinstance(d, int) for d in rest):
            return None
        columns, dtype = rest[1] if len(rest) == 2 else 0, str(binding.var.ty.dtype)
        if same_shape([first], [self.tiles]):
            return "token", columns, dtype
        return ("sequence", columns, dtype) if same_shape([first], self.sequence_tiles) else None
