"""Remove padding: from `(batch, length, columns)` to packed rows `(tiles, row_tile, columns)`.

    encode(input_ids (b, s) i64, attention_mask (b, s) i64, ...)    --> encode(input_ids (t, R) i32, ...,
    h (b, s, 768) = layer_norm(...)                                        cu_seqlens (n,) i32, query_tiles (q, 3) i32)
    turbo.attention(q, k, v, mask)                                        turbo.attention(q, k, v, query_tiles)
    turbo.pool(h, mask) -> (b, 768)                                       turbo.pool(h, cu_seqlens) -> (p, R, 768)
    patches (b, 197, 768) f32                                             patches (t, R, 768) f32

Row-wise operators never mix tokens, so they carry over unchanged once their batch and length dimensions are read as
tile and row of the tile. Pooled rows are packed into tiles in the same way. Everything computed from the mask or from
the padded length alone disappears.

The pass is all or nothing. An operator that mixes rows in a way no operator of ours covers raises `Declined`, and the
pipeline compiles the padded graph instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import ir, relax, tirx

from turbo_tvm.ops import Attention, L2Normalize, Operator, Pool, Rotary
from turbo_tvm.ops.call import match, operators, to_call
from turbo_tvm.ops.inputs import NUM_INPUT, InputKind, Inputs, batch_shape, input_params, weight_params
from turbo_tvm.passes.rewriter import (
    builder_without,
    has_symbolic_shape,
    is_tensor,
    same_shape,
    shape_of,
    substitute,
    tidy,
)

ELEMENTWISE = frozenset(
    [
        "add",
        "subtract",
        "multiply",
        "divide",
        "power",
        "maximum",
        "minimum",
        "negative",
        "abs",
        "exp",
        "sqrt",
        "rsqrt",
        "erf",
        "tanh",
        "sigmoid",
        "clip",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.relu",
        "nn.silu",
    ]
)


INDEPENDENT = "an output does not depend on the tokens"


@tvm_ffi.register_error
class Declined(Exception):
    """A pass met something it does not handle; its text says what, for `turbo-tvm inspect`.

    It is registered so that TVM, which runs the passes, raises it again as what it was.
    """


def sequence_tiles(boundaries: tirx.Var, row_tile: int) -> relax.Expr:
    """How many tiles hold one row per sequence; `boundaries` is the length of `cu_seqlens`."""
    return boundaries - 1 if row_tile == 1 else (boundaries - 1 + row_tile - 1) // row_tile


def remove_padding(mod: ir.IRModule, function: str, row_tile: int) -> ir.IRModule:
    """Rewrite a function to packed rows; raises `Declined` and changes nothing if any part does not fit.

    row_tile: rows per tile of the target's matrix kernel; the row count of a batch is rounded up to it once.
    """
    return _RemovePadding(mod, function, row_tile).run()


class _RemovePadding:
    """Maps every old variable to its packed form ("token" or "sequence" rows), or to why it has none."""

    def __init__(self, mod: ir.IRModule, function: str, row_tile: int):
        self.name, self.row_tile = function, row_tile
        self.func: relax.Function = mod[function]
        self.builder = builder_without(mod, function)
        self.mask = Inputs.of(self.func).attention_mask
        self.batch, self.length = batch_shape(self.func)[:2]
        self.new: dict[relax.Var, relax.Expr] = {}
        self.kind: dict[relax.Var, str] = {}
        self.reason: dict[relax.Var, str] = {}
        tiles, boundaries, queries = (tirx.Var(name, "int64") for name in ("tiles", "boundaries", "queries"))
        self.rows = (tiles, row_tile)
        self.cu_seqlens = relax.Var(InputKind.CU_SEQLENS.parameter, relax.TensorType((boundaries,), "int32"))
        self.query_tiles = relax.Var(InputKind.QUERY_TILES.parameter, relax.TensorType((queries, 3), "int32"))
        self.pooled_rows = relax.Var(InputKind.POOLED_ROWS.parameter, relax.TensorType((boundaries,), "int32"))
        self.pooled = sequence_tiles(boundaries, row_tile)

    def run(self) -> ir.IRModule:
        inputs = self._inputs()
        params = [*inputs, *self._weights()]
        with self.builder.function(self.name, params, attrs={NUM_INPUT: len(inputs)}):
            with self.builder.dataflow():
                for block in self.func.body.blocks:
                    for binding in block.bindings:
                        self._visit(binding.var, binding.value)
                declined = self._why_not()
                # TVM complains of a builder that is left half-way, so the function is finished in any case.
                result = substitute(self.func.body.body, self.new) if declined is None else params[0]
                outputs = self.builder.emit_output(result)
            self.builder.emit_func_output(outputs)
        if declined is not None:
            raise Declined(declined)
        return tidy(self.builder.finalize())

    def _inputs(self) -> list[relax.Var]:
        packed = []
        for old in input_params(self.func):
            if self._is_mask(old):
                self._leave(old, "it reads the attention mask")
                continue
            tokens, columns = shape_of(old)[:2], shape_of(old)[2:]
            if not same_shape(tokens, [self.batch, self.length]) or len(columns) > 1:
                raise Declined(f"the input {old.name} does not hold one number per token")
            new = relax.Var(old.name, relax.TensorType((*self.rows, *columns), old.ty.dtype if columns else "int32"))
            self._keep(old, new, "token" if columns else "ids")
            packed.append(new)
        pooled = self._pooled_tokens()
        if len(pooled) > 1:
            raise Declined(f"the tokens {sorted(pooled)} are pooled; one of them is supported")
        return [*packed, self.cu_seqlens, self.query_tiles, *([self.pooled_rows] if pooled else [])]

    def _pooled_tokens(self) -> set[int]:
        """The ids of tokens that are pooled."""
        pools = [found for found in operators(self.func) if isinstance(found, Pool)]
        return {pool.token for pool in pools if pool.token is not None}

    def _weights(self) -> list[relax.Var]:
        weights = weight_params(self.func)
        for weight in weights:
            self._keep(weight, weight, "weight")
        return weights

    def _keep(self, old: relax.Var, new: relax.Expr, kind: str) -> None:
        self.new[old], self.kind[old] = new, kind

    def _leave(self, old: relax.Var, reason: str) -> None:
        self.kind[old], self.reason[old] = "unmapped", reason

    def _visit(self, var: relax.Var, value: relax.Expr) -> None:
        try:
            expr, kind = self._map(var, value)
        except Declined as why:
            self._leave(var, str(why))
            return
        self._keep(var, expr if isinstance(expr, relax.Var | relax.Tuple) else self.builder.emit(expr), kind)

    def _map(self, var: relax.Var, value: relax.Expr) -> tuple[relax.Expr, str]:
        """The packed form of one binding's value, and its kind."""
        found = match(value, Operator)
        args = [arg for arg in _variables(value) if found is None or not self._is_mask(arg)]
        kinds = {self.kind[arg] for arg in args} - {"weight"}
        for arg in args:
            if self.kind[arg] == "unmapped":
                first = kinds != {"unmapped"} and not isinstance(value, relax.Tuple)
                raise Declined(f"{_name(value)}: {self.reason[arg]}" if first else self.reason[arg])
        if not kinds:
            if all(is_tensor(v) for v in relax.analysis.free_vars(value)) and not has_symbolic_shape(var):
                return substitute(value, self.new), "weight"
            raise Declined(f"{_name(value)} computes from the padded shape")
        if isinstance(value, relax.Tuple) and any(self._kind(field) in ("weight", "ids") for field in value.fields):
            raise Declined(INDEPENDENT)
        if isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem):
            return substitute(value, self.new), kinds.pop() if len(kinds) == 1 else "tuple"
        if found is not None:
            return self._operator(found)
        if len(kinds) > 1:
            raise Declined(f"{_name(value)} combines rows of tokens with rows of sequences")
        return self._row_wise(value, kinds.pop())

    def _operator(self, found: Operator) -> tuple[relax.Expr, str]:
        """Return an operator of ours on packed rows, and the kind of its result."""
        packed: Any = found.with_tensors(lambda t: None if self._is_mask(t) else substitute(t, self.new))
        if isinstance(packed, Attention):
            out = relax.TensorType((*shape_of(packed.q)[:2], packed.inner), "float32")
            return to_call(replace(packed, query_tiles=self.query_tiles, out=out)), "token"
        if isinstance(packed, Pool):
            out = relax.TensorType((self.pooled, self.row_tile, shape_of(packed.x)[2]), "float32")
            if packed.token is not None:
                return to_call(replace(packed, pooled_rows=self.pooled_rows, out=out)), "sequence"
            return to_call(replace(packed, cu_seqlens=self.cu_seqlens, out=out)), "sequence"
        if isinstance(packed, L2Normalize):
            return to_call(replace(packed, out=packed.x.ty)), "sequence"
        if isinstance(packed, Rotary):
            return to_call(replace(packed, out=packed.x.ty)), "token"
        raise Declined(f"turbo.{found.NAME} has no packed form")

    def _is_mask(self, expr: relax.Expr) -> bool:
        return self.mask is not None and expr.same_as(self.mask)

    def _row_wise(self, call: relax.Call, kind: str) -> tuple[relax.Expr, str]:
        """An operator that treats every row alike."""
        name = _name(call).removeprefix("relax.")
        args = [substitute(arg, self.new) for arg in call.args]
        if kind == "ids":
            return self._on_ids(name, call, args)
        rank = 3 if kind == "token" else 2
        if name in ELEMENTWISE:
            self._check_broadcast(call, rank)
            return relax.Call(call.op, args, call.attrs), kind
        if name == "astype":
            return relax.Call(call.op, args, call.attrs), kind
        rule = _LAST_AXIS.get(name)
        has_columns = len(shape_of(call.args[0])) == rank  # else the last axis is the rows'
        last = rule(call, args, rank) if rule is not None and has_columns else None
        if last is None:
            raise Declined(f"{call.op.name} is not known to treat rows alike")
        return last, kind

    def _on_ids(self, name: str, call: relax.Call, args: list[relax.Expr]) -> tuple[relax.Expr, str]:
        if name == "astype" and str(call.attrs.dtype).startswith("int"):
            return args[0], "ids"
        axis = call.attrs.axis if name == "take" else None
        takes_rows = axis is not None and int(axis) == 0 and self._kind(call.args[0]) == "weight"
        if takes_rows and len(shape_of(call.args[1])) == 2:
            return relax.op.take(args[0], args[1], axis=0, mode=call.attrs.mode), "token"
        raise Declined(f"{call.op.name} is applied to token ids")

    def _kind(self, expr: relax.Expr) -> str:
        return self.kind.get(expr, "weight") if isinstance(expr, relax.Var) else "weight"

    def _check_broadcast(self, call: relax.Call, rank: int) -> None:
        """Weights may broadcast along columns only: any leading dimension would change its meaning."""
        ranks = {len(shape_of(arg)) for arg in call.args if self._kind(arg) != "weight"}
        if len(ranks) > 1:
            raise Declined(f"{call.op.name} combines one number per row with a vector per row")
        for arg in call.args:
            if self._kind(arg) != "weight" or not isinstance(arg.ty, relax.TensorType):
                continue
            rows = shape_of(arg)[:-1] if ranks == {rank} else shape_of(arg)
            if any(not (isinstance(d, int) and d == 1) for d in rows) or len(shape_of(arg)) > rank:
                raise Declined(f"{call.op.name} combines rows with a weight that differs from row to row")

    def _why_not(self) -> str | None:
        """Why the outputs have no packed form; None if they have."""
        for var in _variables(self.func.body.body):
            if self.kind[var] == "unmapped":
                return self.reason[var]
            if self.kind[var] in ("weight", "ids"):
                return INDEPENDENT
        return None


Rule = Callable[[relax.Call, list[relax.Expr], int], relax.Expr | None]


def _axis_is_last(axis: Any, rank: int) -> bool:
    return axis is not None and int(axis) % rank == rank - 1


def _layer_norm(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    axes, a = list(call.attrs.axes), call.attrs
    if len(axes) != 1 or not _axis_is_last(axes[0], rank):
        return None
    return relax.op.nn.layer_norm(*args, axes=[-1], epsilon=a.epsilon, center=a.center, scale=a.scale)


def _softmax(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    return relax.op.nn.softmax(args[0], axis=-1) if _axis_is_last(call.attrs.axis, rank) else None


def _matmul(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    weight = shape_of(args[1])
    return relax.op.matmul(*args) if len(weight) == 2 and not any(isinstance(d, tirx.Var) for d in weight) else None


def _split(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    sections = call.attrs.indices_or_sections
    cuts = [int(i) for i in sections] if not isinstance(sections, int | tirx.IntImm) else int(sections)
    return relax.op.split(args[0], cuts, axis=-1) if _axis_is_last(call.attrs.axis, rank) else None


def _squeeze(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    axes = list(call.attrs.axis or [])
    return relax.op.squeeze(args[0], axis=[-1]) if len(axes) == 1 and _axis_is_last(axes[0], rank) else None


def _mean(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    axes = list(call.attrs.axis or [])
    if len(axes) != 1 or not _axis_is_last(axes[0], rank) or not call.attrs.keepdims:
        return None
    return relax.op.mean(args[0], axis=-1, keepdims=True)


def _rms_norm(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    axes = list(call.attrs.axes)
    if len(axes) != 1 or not _axis_is_last(axes[0], rank):
        return None
    return relax.op.nn.rms_norm(*args, axes=[-1], epsilon=call.attrs.epsilon)


def _strided_slice(call: relax.Call, args: list[relax.Expr], rank: int) -> relax.Expr | None:
    x, axes, *bounds = args
    if len(axes.fields) != 1 or not _axis_is_last(axes.fields[0].value, rank):
        return None
    return relax.op.strided_slice(x, [rank - 1], *([int(b.fields[0].value)] for b in bounds))


_LAST_AXIS: dict[str, Rule] = {
    "mean": _mean,
    "nn.rms_norm": _rms_norm,
    "strided_slice": _strided_slice,
    "nn.layer_norm": _layer_norm,
    "nn.softmax": _softmax,
    "matmul": _matmul,
    "split": _split,
    "squeeze": _squeeze,
}


def _name(value: relax.Expr) -> str:
    return value.op.name if isinstance(value, relax.Call) and isinstance(value.op, ir.Op) else type(value).__name__


def _variables(expr: relax.Expr) -> list[relax.Var]:
    """The tensors an expression reads directly (a symbolic dimension is a variable too)."""
    return [v for v in relax.analysis.free_vars(expr) if is_tensor(v)]
