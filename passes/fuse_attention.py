"""Fuse attention, in its eager and its scaled_dot_product_attention spelling, and drop the mask arithmetic.

    reshape(nn.attention_bias(reshape(q), reshape(k), reshape(v), bias))        sdpa
    reshape(permute(softmax(q k^T * scale + bias) v))                           eager
        --> turbo.attention(q, k, v, mask, [position_bias], [key_table], [query_table])

The bias is evaluated (see `evaluate.py`): where the mask is 1 it must be zero, or a function of j - i alone; where the
mask is 0, at most -1e4 below that. Then it is the key mask, plus a relative position bias that becomes one weight of
`2 * max_length - 1` columns per head (a causal mask is such a bias as well). Scores that multiply tokens with weights
by their distance are recognised in `disentangled.py`, and get a table for either side. Anything else is left alone:
per-pair masks, biases of absolute positions or of token ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.passes import composite
from turbo_tvm.passes.disentangled import DisentangledAttention
from turbo_tvm.passes.evaluate import emit_concrete, evaluate
from turbo_tvm.passes.normalize import same_shape
from turbo_tvm.passes.rewriter import Rewriter, is_call, scalar, shape_of

MASKED = -1e4  # exp of it is zero in fp32


def fuse_attention(mod: ir.IRModule, max_length: int) -> ir.IRModule:
    """Replace every recognised attention by a `turbo.attention` composite.

    max_length: the longest sequence, in tokens; a position bias is tabulated up to it.
    """
    return _FuseAttention(mod, max_length).run()


@dataclass(frozen=True)
class _Attention:
    """The operands of one attention, each `(batch, length, heads, head_dim)`."""

    q: relax.Expr
    k: relax.Expr
    v: relax.Expr
    biases: tuple[relax.Expr, ...]
    scale: float


class _FuseAttention(Rewriter):
    def __init__(self, mod: ir.IRModule, max_length: int):
        super().__init__(mod)
        self.max_length = max_length
        self.inputs = {p.name: p for p in self.func.params[: int(self.func.attrs["num_input"])]}
        self._disentangled_attention: DisentangledAttention | None = None
        self._position_biases: dict[tuple, relax.Expr | bool] = {}

    def rules(self):
        return (self._attention, self._disentangled) if "attention_mask" in self.inputs else ()

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
        width = heads * head_dim
        rows = [batch, length, width]
        if not same_shape(list(call.args[1].values), rows) or not all(
            same_shape(shape, shape_of(x)) for x in (found.k, found.v)
        ):
            return None
        operands = [self._tokens(x, rows) for x in (found.q, found.k, found.v)]
        if any(x is None for x in operands):
            return None
        bias = self._bias(found.biases, (batch, length), heads)
        if bias is False:
            return None
        mask = self.inputs["attention_mask"]
        return composite.make(
            "attention",
            [*operands, mask, *([] if bias is True else [bias])],
            relax.TensorType((batch, length, width), "float32"),
            heads=heads,
            head_dim=head_dim,
            scale=found.scale,
            columns=[[width, 0]] * 3,
            max_length=self.max_length,
        )

    def _disentangled(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "reshape") or len(call.args[1].values) != 3:
            return None
        mask = self.inputs["attention_mask"]
        if self._disentangled_attention is None:
            self._disentangled_attention = DisentangledAttention(self, mask, self.max_length)
        found = self._disentangled_attention.match(call)
        if found is None:
            return None
        width = found.heads * found.head_dim
        return composite.make(
            "attention",
            [found.q, found.k, found.v, mask, *found.tables.values()],
            relax.TensorType((*shape_of(mask), width), "float32"),
            heads=found.heads,
            head_dim=found.head_dim,
            scale=found.scale,
            columns=[[width, 0]] * 3,
            max_length=self.max_length,
            **{f"{term}_distances": True for term in found.tables},
        )

    def _tokens(self, x: relax.Expr, rows: list) -> relax.Expr | None:
        """The matrix of shape `rows`, (batch, length, heads * head_dim), that was reshaped into heads."""
        split = self.call_of(x, "reshape")
        return split.args[0] if split is not None and same_shape(shape_of(split.args[0]), rows) else None

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
        softmax = self.call_of(product.args[0], "nn.softmax")
        if softmax is None or int(softmax.attrs.axis) not in (-1, 3):
            return None
        v = self._permuted(product.args[1], [0, 2, 1, 3])
        scores, biases, scale = self._split_scores(softmax.args[0])
        if scores is None:
            return None
        q_scaled, q_scale = self._unscaled(scores.args[0])
        q = self._permuted(q_scaled, [0, 2, 1, 3])
        k = self._permuted(scores.args[1], [0, 2, 3, 1])
        if q is None or k is None or v is None:
            return None
        return _Attention(q, k, v, tuple(biases), scale * q_scale)

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

    def _bias(self, biases: tuple[relax.Expr, ...], tokens: tuple, heads: int) -> relax.Expr | bool:
        """True: the biases are the key mask (or absent). An expression: its position table. False: not recognised."""
        key = tuple(biases)
        if key not in self._position_biases:
            self._position_biases[key] = self._analyse(biases, tokens, heads)
        return self._position_biases[key]

    def _analyse(self, biases: tuple[relax.Expr, ...], tokens: tuple, heads: int) -> relax.Expr | bool:
        # Without any mask every row of the padded batch attends to the padding too: not what packing computes.
        if not biases or any(not isinstance(d, tirx.Var) for d in tokens):
            return False
        total = biases[0]
        for other in biases[1:]:
            total = self.emit(relax.op.add(total, other))
        # At the longest length: a window, or blocks of tokens, leave no trace at shorter ones.
        long, short = self.max_length, (self.max_length + 3) // 4
        small, large = (self._measure(total, tokens, heads, length) for length in (short, long))
        if small is None or large is None:
            return False
        middle = slice(long - short, long + short - 1)
        if not np.array_equal(small, large[:, middle]):
            return False
        return True if not large.any() else self._position_table(total, tokens, heads)

    def _measure(self, bias: relax.Expr, tokens: tuple, heads: int, length: int) -> np.ndarray | None:
        """The bias as a table (heads, 2 * length - 1) over j - i, or None if it is anything else."""
        full = np.ones((3, length), "int64")
        ragged = np.arange(length)[None, :] < np.array([[length], [length // 2], [1]])
        values = [v for mask in (full, ragged.astype("int64")) if (v := self._run(bias, tokens, mask)) is not None]
        shape = (3, heads, length, length)
        if len(values) != 2 or any(not _broadcasts(v.shape, shape) for v in values):
            return None
        unmasked, masked = values
        keep = ragged[:, None, None, :]
        if not np.where(keep, masked == unmasked, masked - unmasked <= MASKED).all():
            return None
        if not (unmasked == unmasked[:1]).all():
            return None
        bias = np.broadcast_to(unmasked[0], shape[1:])
        by_distance = (bias[:, 1:, 1:] == bias[:, :-1, :-1]).all()
        return np.concatenate([bias[:, :0:-1, 0], bias[:, 0, :]], axis=-1) if by_distance else None

    def _run(self, bias: relax.Expr, tokens: tuple, mask: np.ndarray) -> np.ndarray | None:
        rng = np.random.default_rng(0)

        def value_of(param: relax.Var) -> np.ndarray | None:
            if param.same_as(self.inputs["attention_mask"]):
                return mask.astype(str(param.ty.dtype))
            if any(param.same_as(p) for p in self.inputs.values()):
                return None
            return rng.standard_normal([int(d) for d in shape_of(param)]).astype(str(param.ty.dtype))

        return evaluate(self, bias, dict(zip(tokens, mask.shape, strict=True)), value_of)

    def _position_table(self, bias: relax.Expr, tokens: tuple, heads: int) -> relax.Expr:
        """Emit the bias at batch 1 and the longest length, as an expression over weights, and its table."""
        length, mask = self.max_length, self.inputs["attention_mask"]
        ones = {mask: relax.const(np.ones((1, length), str(mask.ty.dtype)))}
        square = emit_concrete(self, bias, dict(zip(tokens, (1, length), strict=True)), ones)
        table = relax.TensorType((heads, 2 * length - 1), "float32")
        return self.emit(composite.make("toeplitz", [square], table))


def _broadcasts(shape: tuple, wanted: tuple) -> bool:
    return len(shape) == len(wanted) and all(d in (1, w) for d, w in zip(shape, wanted, strict=True))
