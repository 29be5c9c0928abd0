"""Fuse attention, in its eager and its scaled_dot_product_attention spelling, and drop the mask arithmetic.

    reshape(nn.attention_bias(reshape(q), reshape(k), reshape(v), bias))        sdpa
    reshape(permute(softmax(q k^T * scale + bias) v))                           eager
        --> turbo.attention(q, k, v, mask, [position_bias], [key_table], [query_table])

The operands are columns of rows (see `head_operands.py`); those that are turned by position are turned by a
`turbo.rotary` in front. Heads of keys and values may be fewer than those of queries.

The bias is measured (see `measure_bias.py`): it is the key mask, plus a window, which becomes an attribute, or a
relative position bias, which becomes one weight of `2 * max_length - 1` columns per head. Scores that multiply tokens
with weights by their distance are recognised in `disentangled.py`, and get a table for either side. Anything else is
left alone: per-pair masks, biases of absolute positions or of token ids. Images have no padding: there the bias must be
zero, or absent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import ir, relax, tirx

from turbo_tvm.ops import Attention, Rotary
from turbo_tvm.ops.call import to_call
from turbo_tvm.ops.inputs import Inputs
from turbo_tvm.ops.rotary import joined_spans
from turbo_tvm.passes.analysis.disentangled import DisentangledAttention
from turbo_tvm.passes.analysis.disentangled_formula import KEYS, QUERIES
from turbo_tvm.passes.analysis.evaluate import evaluate
from turbo_tvm.passes.analysis.head_operands import HeadOperand, HeadOperands
from turbo_tvm.passes.analysis.measure_bias import Bias, BiasMeasurement
from turbo_tvm.passes.rewriter import Rewriter, is_call, same_shape, scalar, shape_of


def fuse_attention(mod: ir.IRModule, function: str, max_length: int) -> ir.IRModule:
    """Replace every recognised attention by a `Attention` operator.

    max_length: the longest sequence, in tokens; tables over positions and distances reach up to it.
    """
    return _FuseAttention(mod, function, max_length).run()


@dataclass(frozen=True)
class _Attention:
    """The operands of one attention, each `(batch, length, heads, head_dim)`."""

    q: relax.Expr
    k: relax.Expr
    v: relax.Expr
    biases: tuple[relax.Expr, ...]
    scale: float


class _FuseAttention(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, max_length: int):
        super().__init__(mod, function)
        self.max_length = max_length
        self.inputs = Inputs.of(self.func)
        self._biases: dict[tuple, Bias | None] = {}
        self._operands: HeadOperands | None = None
        self._disentangled_attention: DisentangledAttention | None = None

    def rules(self):
        return (self._attention, self._disentangled) if self.inputs.attention_mask is not None else ()

    def _attention(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "reshape") or len(call.args[1].values) != 3:
            return None
        found = self._sdpa(call.args[0]) or self._eager(call.args[0])
        if found is None:
            return None
        shape = shape_of(found.q)
        if len(shape) != 4 or not all(isinstance(d, int) for d in shape[2:]):
            return None
        batch, length, heads, head_dim = shape
        if not isinstance(batch, tirx.Var) or (isinstance(length, int) and not self.inputs.are_images):
            return None
        if not same_shape(list(call.args[1].values), [batch, length, heads * head_dim]):
            return None
        operands = self._heads(found, (batch, length))
        bias = self._bias(found.biases, (batch, length), heads) if operands is not None else None
        if operands is None or bias is None:
            return None
        q, k, v = self._turned(operands)
        attention = Attention(
            q=q,
            k=k,
            v=v,
            mask=self.inputs.attention_mask,
            position_bias=bias.table,
            out=relax.TensorType((batch, length, heads * head_dim), "float32"),
            heads=heads,
            head_dim=head_dim,
            scale=_rounded(found.scale, head_dim),
            max_length=self.max_length,
            first_columns=(operands[0].first_column, operands[1].first_column, operands[2].first_column),
            kv_heads=operands[1].heads if operands[1].heads < heads else None,
            window=bias.window,
        )
        return to_call(attention)

    def _disentangled(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "reshape") or len(call.args[1].values) != 3:
            return None
        mask = self.inputs.attention_mask
        if self._disentangled_attention is None:
            self._disentangled_attention = DisentangledAttention(self, mask, self.max_length)
        found = self._disentangled_attention.match(call)
        if found is None:
            return None
        attention = Attention(
            q=found.q,
            k=found.k,
            v=found.v,
            mask=mask,
            key_table=found.tables.get(KEYS),
            query_table=found.tables.get(QUERIES),
            out=relax.TensorType((*shape_of(mask), found.heads * found.head_dim), "float32"),
            heads=found.heads,
            head_dim=found.head_dim,
            scale=found.scale,
            max_length=self.max_length,
            first_columns=(0, 0, 0),
        )
        return to_call(attention)

    def _heads(self, found: _Attention, tokens: tuple) -> list[HeadOperand] | None:
        """Where queries, keys and values come from; None if that is not columns of rows."""
        shape = shape_of(found.q)
        if not all(same_shape(shape, shape_of(x)) for x in (found.k, found.v)):
            return None
        if self._operands is None:
            self._operands = HeadOperands(self, tokens, self.max_length, self.inputs.position_ids)
        q, k, v = (self._operands.find(x) for x in (found.q, found.k, found.v))
        if q is None or k is None or v is None or q.heads != shape[2] or k.heads != v.heads:
            return None
        return [q, k, v] if v.table is None else None

    def _turned(self, operands: list[HeadOperand]) -> list[relax.Expr]:
        """The rows of the operands, turned by position; those of the same rows together, so that one buffer does."""
        q, k, v = operands
        together = q.rows.same_as(k.rows) and q.table is not None and k.table is not None and q.table.same_as(k.table)
        if together:
            rows = self._rotary(q, [q, k])
            return [rows, rows, rows if v.rows.same_as(q.rows) else v.rows]
        return [x.rows if x.table is None else self._rotary(x, [x]) for x in operands]

    def _rotary(self, x: HeadOperand, turned: list[HeadOperand]) -> relax.Expr:
        rotary = Rotary(
            x=x.rows,
            position_ids=self.inputs.position_ids,
            table=x.table,
            out=x.rows.ty,
            columns=x.width,
            head_dim=x.head_dim,
            spans=joined_spans([(y.first_column, y.heads) for y in turned], x.head_dim),
        )
        return self.emit(to_call(rotary))

    def _sdpa(self, out: relax.Expr) -> _Attention | None:
        core = self.definition(out)
        if not (is_call(core, "nn.attention_bias") or is_call(core, "nn.attention")):
            return None
        if core.attrs.causal_mask is not None or core.attrs.window_size is not None:
            return None
        q, k, v, *bias = core.args
        scale = core.attrs.scale
        head_dim = int(shape_of(q)[3])
        return _Attention(q, k, v, tuple(bias), float(scale) if scale is not None else 1.0 / math.sqrt(head_dim))

    def _eager(self, out: relax.Expr) -> _Attention | None:
        product = self._unpermuted(out, [0, 2, 1, 3], "matmul")
        if product is None:
            return None
        softmax = self._softmax(product.args[0])
        if softmax is None or int(softmax.attrs.axis) not in (-1, 3):
            return None
        scores, biases, scale = self._split_scores(softmax.args[0])
        if scores is None:
            return None
        (q, q_scale), (k, k_scale) = (self._unscaled(x) for x in scores.args)
        rows_first = ((q, [0, 2, 1, 3]), (k, [0, 3, 1, 2]), (product.args[1], [0, 2, 1, 3]))
        if any(len(shape_of(x)) != 4 for x, _ in rows_first):
            return None
        q, k, v = (self.emit(relax.op.permute_dims(x, axes)) for x, axes in rows_first)
        return _Attention(q, k, v, tuple(biases), scale * q_scale * k_scale)

    def _softmax(self, x: relax.Expr) -> relax.Call | None:
        """A softmax; where(isnan(softmax), 0, softmax), which guards rows without any key, is one for all others."""
        guard = self.call_of(x, "where")
        if guard is not None:
            condition, zero, x = guard.args
            nan = self.call_of(condition, "isnan")
            if nan is None or not nan.args[0].same_as(x) or scalar(zero) != 0.0:
                return None
        return self.call_of(x, "nn.softmax")

    def _permuted(self, x: relax.Expr, axes: list[int]) -> relax.Expr | None:
        permute = self.call_of(x, "permute_dims")
        if permute is None or permute.attrs.axes is None or [int(a) for a in permute.attrs.axes] != axes:
            return None
        return permute.args[0]

    def _unpermuted(self, x: relax.Expr, axes: list[int], op: str) -> relax.Call | None:
        source = self._permuted(x, axes)
        return self.call_of(source, op) if source is not None else None

    def _unscaled(self, x: relax.Expr) -> tuple[relax.Expr, float]:
        value = self.definition(x)
        factor = scalar(value.args[1]) if is_call(value, "multiply") or is_call(value, "divide") else None
        if factor is None:
            return x, 1.0
        return value.args[0], factor if is_call(value, "multiply") else 1.0 / factor

    def _split_scores(self, x: relax.Expr) -> tuple[relax.Call | None, list[relax.Expr], float]:
        """softmax's argument as (q k^T, biases, scale)."""
        biases: list[relax.Expr] = []
        while (add := self.call_of(x, "add")) is not None:
            left, right = add.args
            if self._has_product(right):
                left, right = right, left
            biases.append(right)
            x = left
        source, scale = self._unscaled(x)
        return self.call_of(source, "matmul"), biases, scale

    def _has_product(self, x: relax.Expr) -> bool:
        while (add := self.call_of(x, "add")) is not None:
            x = add.args[0]
        return self.call_of(self._unscaled(x)[0], "matmul") is not None

    def _bias(self, biases: tuple[relax.Expr, ...], tokens: tuple, heads: int) -> Bias | None:
        """What the biases are beside the key mask; None if they are not recognised."""
        if self.inputs.are_images:
            return Bias() if self._all_zero(biases, tokens) else None
        if (biases, heads) not in self._biases:
            mask = self.inputs.attention_mask
            measurement = BiasMeasurement(self, tokens, self.max_length, mask)
            self._biases[biases, heads] = measurement.analyse(biases, heads)
        return self._biases[biases, heads]

    def _all_zero(self, biases: tuple[relax.Expr, ...], tokens: tuple) -> bool:
        """Whether tokens of images, which are never padded, all see each other."""
        values = [evaluate(self, bias, {tokens[0]: 2}, lambda _param: None) for bias in biases]
        return all(value is not None and not value.any() for value in values)


def _rounded(scale: float, head_dim: int) -> float:
    """The usual scale where it is that but for rounding, as where queries and keys get a half of it each."""
    usual = 1.0 / math.sqrt(head_dim)
    return usual if math.isclose(scale, usual, rel_tol=1e-6) else scale
