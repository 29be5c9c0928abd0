"""What the bias of an attention says, measured: a key mask, a window around each query, or a table over distances.

A bias is evaluated (see `evaluate.py`) with all keys real and with some masked. Where the mask is 1 it must be zero, or
a function of j - i alone; where the mask is 0, at most -1e4 below that. A function of j - i that is zero up to a
distance, and at most -1e4 beyond, is a window. Any other becomes a table of `2 * max_length - 1` columns per head (a
causal mask is such a function as well).

A bias of two positions has max_length^2 values. Where it is computed from `arange` by operators that look at one pair
of positions at a time, a sample of positions is put in its place, chosen so that every distance occurs; a few hundred
of them stand for 8,192. What is assumed then: that a function of positions which agrees on all pairs of the sample,
among them random ones, is a function of their distance. Other spellings are evaluated whole, up to 1,024 positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import relax

from turbo_tvm.ops.inputs import input_params
from turbo_tvm.passes.analysis.evaluate import cut, evaluate, is_arange, specialized
from turbo_tvm.passes.rewriter import Rewriter, has_symbolic_shape, is_call, shape_of

MASKED = -1e4  # exp of it is zero in fp32
_MOST_WHOLE = 1024  # positions of a bias that is evaluated for all pairs
_MOST_PLAIN = 512  # positions that are not worth a sample
_RANDOM = 64  # positions of a sample beyond those that make up all distances

# Operators that compute an element from the elements at the same place, or move elements.
# fmt: off
_POINTWISE = frozenset(
    [
        "add", "subtract", "multiply", "divide", "floor_divide", "mod", "power", "maximum", "minimum", "negative",
        "abs", "exp", "log", "sqrt", "rsqrt", "floor", "ceil", "round", "sign", "clip", "astype", "where", "less",
        "less_equal", "greater", "greater_equal", "equal", "not_equal", "logical_and", "logical_or", "logical_not",
        "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "expand_dims", "squeeze",
        "reshape", "broadcast_to", "permute_dims", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like",
    ]
)
# fmt: on


@dataclass(frozen=True)
class Bias:
    """What a bias is beside the key mask: a window, a table (heads, 2 * max_length - 1) over distances, or nothing."""

    window: int | None = None
    table: relax.Expr | None = None


@dataclass(frozen=True)
class _Measured:
    """values: (1 or heads, 2 * max_length - 1) over j - i. pairs: for each distance the place of a pair that has it,
    among all pairs of positions."""

    values: np.ndarray
    pairs: np.ndarray


class BiasMeasurement:
    """Measures biases in the function that a rewriter is rebuilding.

    tokens: the symbolic batch and length. mask: the input that says which keys are real.
    """

    def __init__(self, rewriter: Rewriter, tokens: tuple, max_length: int, mask: relax.Var):
        self.rewriter, self.tokens, self.max_length, self.mask = rewriter, tokens, max_length, mask
        self.inputs = input_params(rewriter.func)

    def analyse(self, biases: tuple[relax.Expr, ...], heads: int) -> Bias | None:
        """The sum of the biases; None if it is not recognised."""
        if not biases:  # without any mask every row of the padded batch attends to the padding too
            return None
        total = biases[0]
        for other in biases[1:]:
            total = self.rewriter.emit(relax.op.add(total, other))
        positions = sample_positions(self.max_length) if self._is_pointwise(total) else np.arange(self.max_length)
        if len(positions) > _MOST_WHOLE:
            return None
        # At the longest length: a window, or blocks of tokens, leave no trace at shorter ones.
        short = min((self.max_length + 3) // 4, _MOST_PLAIN // 2)
        small, large = self._measure(total, heads, np.arange(short)), self._measure(total, heads, positions)
        if small is None or large is None:
            return None
        middle = slice(self.max_length - short, self.max_length + short - 1)
        if not np.array_equal(small.values, large.values[:, middle]):
            return None
        if not large.values.any():
            return Bias()
        window = _window(large.values)
        return Bias(window=window) if window is not None else Bias(table=self._table(total, heads, positions, large))

    def _is_pointwise(self, bias: relax.Expr) -> bool:
        """Whether each element is computed from the positions of its own pair."""
        values = [value for _, value in cut(self.rewriter, bias)[1]]
        for value in values:
            if isinstance(value, relax.Call):
                looked_up = is_call(value, "take") and not has_symbolic_shape(value.args[0])
                known = value.op.name.removeprefix("relax.") in _POINTWISE if hasattr(value.op, "name") else False
                if not (known or looked_up or is_arange(value, self.tokens[1])):
                    return False
        return True

    def _measure(self, bias: relax.Expr, heads: int, positions: np.ndarray) -> _Measured | None:
        """The bias as a function of j - i, or None if it is anything else."""
        count = len(positions)
        ragged = np.arange(count)[None, :] < np.array([[count], [count // 2], [1]])
        both = self._run(
            bias, np.concatenate([np.ones_like(ragged), ragged]), positions
        )  # compiling is what takes time
        if both is None or not _broadcasts(both, (6, heads, count, count)) or len(both) == 1:
            return None
        unmasked, masked = np.split(both, 2)
        with np.errstate(invalid="ignore"):  # -inf less -inf
            dropped = (masked - unmasked <= MASKED) | ((masked <= MASKED) & (unmasked <= MASKED))
        if not np.where(ragged[:, None, None, :], masked == unmasked, dropped).all():
            return None
        if not (unmasked == unmasked[:1]).all():
            return None
        one = np.broadcast_to(unmasked[0], (unmasked.shape[1], count, count))
        longest = int(positions[-1]) + 1
        distances = positions[None, :] - positions[:, None] + longest - 1
        pairs, table = np.zeros(2 * longest - 1, "int64"), np.full((len(one), 2 * longest - 1), np.nan, one.dtype)
        pairs[distances] = np.arange(count * count).reshape(count, count)
        table[:, distances] = one
        return _Measured(table, pairs) if np.array_equal(table[:, distances], one) else None

    def _run(self, bias: relax.Expr, mask: np.ndarray, positions: np.ndarray) -> np.ndarray | None:
        rng = np.random.default_rng(0)

        def value_of(param: relax.Var) -> np.ndarray | None:
            if param.same_as(self.mask):
                return mask.astype(str(param.ty.dtype))
            if any(param.same_as(p) for p in self.inputs):
                return None
            return rng.standard_normal([int(d) for d in shape_of(param)]).astype(str(param.ty.dtype))

        dims = dict(zip(self.tokens, mask.shape, strict=True))
        return evaluate(self.rewriter, bias, dims, value_of, _unless_plain(positions))

    def _table(self, bias: relax.Expr, heads: int, positions: np.ndarray, measured: _Measured) -> relax.Expr:
        """Emit the bias at batch 1 and these positions, as an expression over weights, and its table."""
        count, emit = len(positions), self.rewriter.emit
        ones = relax.const(np.ones((1, count)), str(self.mask.ty.dtype))
        dims = dict(zip(self.tokens, (1, count), strict=True))
        whole = specialized(self.rewriter, bias, dims, {self.mask: ones}, _unless_plain(positions))
        all_heads = emit(relax.op.broadcast_to(whole, (1, heads, count, count)))
        flat = emit(relax.op.reshape(all_heads, (heads, count * count)))
        return emit(relax.op.take(flat, relax.const(measured.pairs.astype("int32")), axis=1, mode="clip"))


def sample_positions(max_length: int) -> np.ndarray:
    """Positions among which every distance below max_length occurs, in order; all of them if they are few."""
    if max_length <= _MOST_PLAIN:
        return np.arange(max_length)
    step = math.isqrt(max_length - 1) + 1
    random = np.random.default_rng(0).integers(0, max_length, _RANDOM)
    return np.unique(np.concatenate([np.arange(step), np.arange(max_length - 1, -1, -step), random]))


def _unless_plain(positions: np.ndarray) -> np.ndarray | None:
    return None if np.array_equal(positions, np.arange(len(positions))) else positions


def _window(table: np.ndarray) -> int | None:
    """The distance up to which all heads see keys, and beyond which none does; None if there is no such distance."""
    longest = (table.shape[1] + 1) // 2
    seen = (table == 0).all(0)
    window = int(np.abs(np.flatnonzero(seen) - (longest - 1)).max(initial=0))
    band = np.abs(np.arange(table.shape[1]) - (longest - 1)) <= window
    return window if np.array_equal(seen, band) and (table[:, ~band] <= MASKED).all() else None


def _broadcasts(value: np.ndarray, wanted: tuple) -> bool:
    return value.ndim == len(wanted) and all(d in (1, w) for d, w in zip(value.shape, wanted, strict=True))
