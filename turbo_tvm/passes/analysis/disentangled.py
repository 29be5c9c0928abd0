"""Recognise disentangled attention (DeBERTa, arXiv 2006.03654): scores of tokens and of the distance between them.

    score(i, j) = scale * (q_i . k_j + q_i . A[i - j] + k_j . B[i - j])        A and B made of weights alone

Only what must be named is looked for: below the softmax, a product of rows with rows (q and k), and products of rows
with weights from which `gather_elements` picks a bucket per pair (A where the rows are q, B where they are k). Then
everything is evaluated (see `evaluate.py`): the buckets at the longest length, where they must depend on i - j alone,
and the whole attention, mask and heads and all, on random rows, against the formula. How the graph spells the rest
(reshapes, scales, masks) does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm_ffi
from tvm import relax, tirx

from turbo_tvm.ops.inputs import input_params, weight_params
from turbo_tvm.passes.analysis.disentangled_formula import TERMS, Measured, Sample, measure
from turbo_tvm.passes.analysis.evaluate import concrete, cut, evaluate, specialized
from turbo_tvm.passes.rewriter import Rewriter, has_symbolic_shape, is_call, is_tensor, same_shape, shape_of

_LAYOUT = ("reshape", "permute_dims", "broadcast_to", "expand_dims", "squeeze")
_SHORT = 9


@dataclass(frozen=True)
class Disentangled:
    """An attention's operands, `(batch, length, heads * head_dim)`, and its tables over distances.

    tables: by TERMS, fp32 `(heads, head_dim, 2 * max_length - 1)`, column i - j + max_length - 1.
    """

    q: relax.Var
    k: relax.Var
    v: relax.Var
    heads: int
    head_dim: int
    scale: float
    tables: dict[str, relax.Expr]


@dataclass(frozen=True)
class _Parts:
    """What was found in the graph. products: by term, rows times weights; buckets: by term, which of its columns."""

    out: relax.Call
    scores: relax.Expr
    q: relax.Var
    k: relax.Var
    v: relax.Var
    heads: int
    head_dim: int
    products: dict[str, relax.Call]
    buckets: dict[str, relax.Expr]


class DisentangledAttention:
    """Finds disentangled attention in the graph of a rewriter; layers alike are evaluated once.

    mask: the attention mask, `(batch, length)`. max_length: the longest sequence, in tokens.
    """

    def __init__(self, rewriter: Rewriter, mask: relax.Var, max_length: int):
        self.rewriter, self.mask, self.max_length = rewriter, mask, max_length
        self._inputs, self._weights = set(input_params(rewriter.func)), set(weight_params(rewriter.func))
        self._measured: list[tuple[relax.Function, Measured | None]] = []

    def match(self, call: relax.Call) -> Disentangled | None:
        """The attention whose result `call` is, or None. The tables are emitted as expressions over weights."""
        parts = self._parts(call)
        if parts is None:
            return None
        measured = self._measure(parts)
        if measured is None:
            return None
        tables = {term: self._table(parts, term, measured.buckets[term]) for term in TERMS if term in parts.products}
        return Disentangled(parts.q, parts.k, parts.v, parts.heads, parts.head_dim, measured.scale, tables)

    def _parts(self, call: relax.Call) -> _Parts | None:
        weighted = self.rewriter.call_of(self._base(call), "matmul")
        if weighted is None:
            return None
        softmax = self.rewriter.call_of(self._base(weighted.args[0]), "nn.softmax")
        if softmax is None or int(softmax.attrs.axis) not in (-1, len(shape_of(softmax.args[0])) - 1):
            return None
        v, below = self._base(weighted.args[1]), list(self._calls_below(softmax.args[0]))
        found = [c for c in below if is_call(c, "matmul") and all(self._is_rows(self._base(x)) for x in c.args)]
        picked = [c for c in below if is_call(c, "gather_elements")]
        if len(found) != 1 or not picked or not self._is_rows(v):
            return None
        q, k = (self._base(x) for x in found[0].args)
        products, buckets = {}, {}
        for gather in picked:
            product = self.rewriter.call_of(self._base(gather.args[0]), "matmul")
            term = self._term(product, q, k) if product is not None else None
            if term is None or term in products:
                return None
            products[term], buckets[term] = product, gather.args[1]
        width, head_dim = shape_of(q)[2], shape_of(found[0].args[0])[-1]
        if not isinstance(head_dim, int) or width % head_dim or not all(shape_of(x)[2] == width for x in (k, v)):
            return None
        return _Parts(call, softmax.args[0], q, k, v, width // head_dim, head_dim, products, buckets)

    def _term(self, product: relax.Call, q: relax.Var, k: relax.Var) -> str | None:
        """Which of TERMS a product of rows with weights is."""
        rows, weights = self._base(product.args[0]), product.args[1]
        if q.same_as(k) or len(shape_of(weights)) < 3 or not self._of_weights(weights):
            return None
        return next((term for term, x in zip(TERMS, (q, k), strict=True) if rows.same_as(x)), None)

    def _base(self, x: relax.Expr) -> relax.Expr:
        """What was laid out anew and scaled to make x: rows, if it comes to any."""
        while not self._is_rows(x):
            value = self.rewriter.definition(x)
            scaled = is_call(value, "multiply") or is_call(value, "divide")
            if not any(is_call(value, op) for op in _LAYOUT) and not (scaled and not shape_of(value.args[1])):
                break
            x = value.args[0]
        return x

    def _is_rows(self, x: relax.Expr) -> bool:
        shape = shape_of(x) if isinstance(x, relax.Var) else []
        return len(shape) == 3 and isinstance(shape[2], int) and same_shape(shape[:2], shape_of(self.mask))

    def _of_weights(self, x: relax.Expr) -> bool:
        """Whether it depends on weights, and on no input but for its shape."""
        params, _ = cut(self.rewriter, x)
        return bool(params) and all(p in self._weights for p in params)

    def _calls_below(self, x: relax.Expr) -> Iterator[relax.Call]:
        """The calls that x is computed by, down to rows."""
        pending, seen = [x], set()
        while pending:
            var = pending.pop()
            value = self.rewriter.definition(var)
            if var in seen or not isinstance(value, relax.Call) or self._is_rows(var):
                continue
            seen.add(var)
            yield value
            pending.extend(v for v in relax.analysis.free_vars(value) if is_tensor(v))

    def _at(self, parts: _Parts) -> list[relax.Var]:
        """Where the graph is cut: at the mask, the rows, and the weights that the products' operands are made of."""
        at = dict.fromkeys([self.mask, parts.q, parts.k, parts.v])
        pending = [product.args[1] for product in parts.products.values()]
        while pending:
            var = pending.pop()
            if not has_symbolic_shape(var) and self._of_weights(var):
                at[var] = None
            else:
                pending.extend(v for v in relax.analysis.free_vars(self.rewriter.definition(var)) if is_tensor(v))
        return list(at)

    def _dims(self, batch: int, length: int) -> dict[tirx.Var, int]:
        return dict(zip(shape_of(self.mask), (batch, length), strict=True))

    def _table(self, parts: _Parts, term: str, buckets: np.ndarray) -> relax.Expr:
        """Emit the weights of a term, a column per distance."""
        ones = {self.mask: relax.const(np.ones((1, self.max_length), str(self.mask.ty.dtype)))}
        weights = parts.products[term].args[1]
        square = specialized(self.rewriter, weights, self._dims(1, self.max_length), ones, at=self._at(parts))
        shape = (parts.heads, parts.head_dim, shape_of(weights)[-1])
        columns = self.rewriter.emit(relax.op.reshape(self.rewriter.emit(square), shape))
        return self.rewriter.emit(relax.op.take(columns, relax.const(buckets), axis=2, mode="clip"))

    def _measure(self, parts: _Parts) -> Measured | None:
        """The scale and the buckets, if the graph computes the formula."""
        weights = [product.args[1] for product in parts.products.values()]
        wanted = relax.Tuple([self.rewriter.emit(parts.out), parts.scores, *weights, *parts.buckets.values()])
        layer = concrete(self.rewriter, wanted, self._dims(1, self.max_length), at=self._at(parts))
        for seen, measured in self._measured:
            if tvm_ffi.structural_equal(seen, layer):
                return measured
        # Where there is padding. And at the longest length: a window, say, leaves no trace at shorter ones.
        ragged = np.arange(_SHORT)[None, :] < np.array([[_SHORT], [_SHORT // 2], [1]])
        found: Measured | None = None
        for mask in (ragged, np.ones((1, self.max_length), bool)):
            sample = self._sample(parts, wanted, mask)
            found = measure(sample) if sample is not None else None
            if found is None:
                break
        self._measured.append((layer, found))
        return found

    def _sample(self, parts: _Parts, wanted: relax.Tuple, mask: np.ndarray) -> Sample | None:
        """What the graph makes of random rows and weights."""
        rng = np.random.default_rng(0)
        rows = {x: rng.standard_normal((*mask.shape, shape_of(x)[2]), "float32") for x in (parts.q, parts.k, parts.v)}

        def value_of(var: relax.Var) -> np.ndarray | None:
            if var.same_as(self.mask):
                return mask.astype(str(var.ty.dtype))
            if var in rows:
                return rows[var]
            if str(var.ty.dtype) != "float32" or var in self._inputs:
                return None
            return rng.normal(0, 0.3, [int(d) for d in shape_of(var)]).astype("float32")

        values = evaluate(self.rewriter, wanted, self._dims(*mask.shape), value_of, at=self._at(parts))
        if values is None:
            return None
        out, scores, *rest = values
        terms = list(parts.products)
        q, k, v = (self._heads(parts, rows[x]) for x in (parts.q, parts.k, parts.v))
        weights = [w.reshape(-1, parts.heads, parts.head_dim, w.shape[-1]) for w in rest[: len(terms)]]
        return Sample(
            mask,
            q,
            k,
            v,
            dict(zip(terms, weights, strict=True)),
            dict(zip(terms, rest[len(terms) :], strict=True)),
            scores.reshape(len(mask), parts.heads, *mask.shape[1:] * 2),
            self._heads(parts, out),
        )

    def _heads(self, parts: _Parts, rows: np.ndarray) -> np.ndarray:
        """fp64 (batch, heads, length, head_dim) of rows (batch, length, heads * head_dim)."""
        split = rows.reshape(*rows.shape[:2], parts.heads, parts.head_dim)
        return split.transpose(0, 2, 1, 3).astype("float64")
