"""Make inputs of the ids that a graph computes itself: positions, and token types that are always 0.

Look-ups of the mask at every place become the mask.

    take(table, slice(arange(512), 0, length))                     --> take(table, position_ids)   "arange"
    take(table, cumsum(ids != pad) * (ids != pad) + pad)           --> take(table, position_ids)   "count_non_pad"
    slice(table, 0, length)                                        --> take(table, position_ids)   "arange"
    take(table, zeros((batch, length)))                            --> take(table, token_type_ids)
    gather_nd(mask, (i, j) for all i, j)                           --> reshape(mask, (batch, 1, 1, length))

Packed rows know nothing of where they stand in their sequence, so the runtime supplies it. What the ids are is
measured on samples (see `evaluate.py`). Ids that follow no known rule are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.ops.inputs import InputKind, Inputs, input_params, weight_params, with_params
from turbo_tvm.passes.analysis.evaluate import cut, evaluate
from turbo_tvm.passes.rewriter import Rewriter, is_call, scalar, shape_of, terms_of, with_function

_LENGTHS = (7, 4, 1)  # of the sample's sequences
_LONGEST = 1024  # tokens of a sequence that confirms what the sample showed
_COMPUTED = (InputKind.TOKEN_TYPE_IDS, InputKind.POSITION_IDS)  # what a graph may compute itself
_COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")

Given = dict[InputKind, np.ndarray]  # values of inputs


@dataclass(frozen=True)
class Positions:
    """How the extracted position ids follow from token ids; as `runtime.manifest.PositionRule`, and the limit.

    rows: of the table that they index: ids are below.
    """

    kind: str
    offset: int
    pad_id: int | None
    rows: int

    @property
    def longest(self) -> int:
        """How many tokens the table has positions for."""
        return self.rows - self.offset - (1 if self.kind == "count_non_pad" else 0)


def extract_inputs(mod: ir.IRModule, function: str, longest: int = _LONGEST) -> tuple[ir.IRModule, Positions | None]:
    """The module with inputs in place of computed ids, and the rule of the positions, if there are any.

    longest: tokens of a sequence that the graph's constants allow. Inputs are added behind those that there are, as
    int64 (batch, length), named position_ids and token_type_ids.
    """
    rewriter = _ExtractInputs(mod, function, longest)
    return rewriter.run(), rewriter.positions


class _ExtractInputs(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, longest: int):
        super().__init__(mod, function)
        self.longest = longest
        self.inputs = Inputs.of(self.func)
        self.weights = set(weight_params(self.func))
        self.terms = terms_of(self.func)
        self.positions: Positions | None = None
        self._added: dict[InputKind, relax.Var] = {}

    def rules(self):
        return self._look_up, self._sliced_table, self._looked_up_mask

    def run(self) -> ir.IRModule:
        """As every rewriter does, with the inputs that were added."""
        token_ids = self.inputs.token_ids
        if token_ids is None:
            return self.mod
        known = self.inputs.given()
        self._added = {kind: relax.Var(kind.parameter, token_ids.ty) for kind in _COMPUTED if kind not in known}
        inputs = [*input_params(self.func), *self._added.values()]
        self.func = with_params(self.func, [*inputs, *weight_params(self.func)], len(inputs))
        mod = super().run()
        func = mod[self.name]
        used = set(relax.analysis.free_vars(func.body))
        added = set(self._added.values())
        kept = [p for p in input_params(func) if p in used or p not in added]
        return with_function(mod, self.name, with_params(func, [*kept, *weight_params(func)], len(kept)))

    def _look_up(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "take") or call.attrs.axis is None or int(call.attrs.axis) != 0:
            return None
        table, ids = call.args
        dims = shape_of(ids)
        if len(shape_of(table)) != 2 or len(dims) != 2 or isinstance(dims[1], int):
            return None
        if self.inputs.kind_of(ids) is not None or not self._is_weight(table):
            return None
        new = self._input_for(ids, int(shape_of(table)[0]))
        return None if new is None else relax.op.take(table, new, axis=0, mode="clip")

    def _sliced_table(self, call: relax.Call) -> relax.Expr | None:
        """The first rows of a table of positions, as many as the sequence has tokens."""
        if not is_call(call, "strided_slice") or InputKind.POSITION_IDS not in self._added:
            return None
        table, dims = call.args[0], shape_of(call.args[0])
        out = shape_of(self.current)
        if not self._is_weight(table) or not all(isinstance(d, int) for d in dims) or len(dims) not in (2, 3):
            return None
        if isinstance(out[-2], int) or out[-1] != dims[-1] or (len(dims) == 3 and dims[0] != 1):
            return None
        axes, begins, _, *steps = ([*part.fields] for part in call.args[1:])
        numbers = [*axes, *begins, *(steps[0] if steps else [tirx.IntImm("int64", 1)])]
        if len(axes) != 1 or not all(isinstance(n, tirx.IntImm) for n in numbers):
            return None
        axis, begin, step = (int(n.value) for n in numbers)
        if axis % len(dims) != len(dims) - 2 or step != 1 or (len(dims) == 2 and self.current not in self.terms):
            return None
        if not self._agree(Positions("arange", begin, None, int(dims[-2]))):
            return None
        flat = table if len(dims) == 2 else self.emit(relax.op.reshape(table, dims[1:]))
        return relax.op.take(flat, self._added[InputKind.POSITION_IDS], axis=0, mode="clip")

    def _looked_up_mask(self, call: relax.Call) -> relax.Expr | None:
        """A look-up that gives the mask of every key of every sequence."""
        mask, tokens = self.inputs.attention_mask, shape_of(self.inputs.token_ids)
        dims = shape_of(self.current)
        if mask is None or not (is_call(call, "gather_nd") or is_call(call, "take")):
            return None
        keys = [i for i, d in enumerate(dims) if not isinstance(d, int) and d.same_as(tokens[1])]
        if len(keys) != 1 or not _is_only(cut(self, call)[0], mask):
            return None
        target = [tokens[0] if i == 0 else tokens[1] if i == keys[0] else 1 for i in range(len(dims))]
        rng = np.random.default_rng(0)
        for shape in ((3, 7), (2, 5)):
            values = rng.integers(0, 2, shape)
            found, whole = (self._evaluate(x, {InputKind.ATTENTION_MASK: values}, shape) for x in (call, call.args[0]))
            wanted = [shape[0] if i == 0 else shape[1] if i == keys[0] else 1 for i in range(len(dims))]
            if found is None or whole is None or list(found.shape) != wanted or whole.size != found.size:
                return None
            if not np.array_equal(found, whole.reshape(wanted)):
                return None
        return relax.op.reshape(call.args[0], target)

    def _is_weight(self, expr: relax.Expr) -> bool:
        params, _ = cut(self, expr) if isinstance(expr, relax.Var) else ([], [])
        return isinstance(expr, relax.Var) and bool(params) and all(p in self.weights for p in params)

    def _input_for(self, ids: relax.Expr, rows: int) -> relax.Expr | None:
        """The input that holds these ids."""
        if self.longest < max(_LENGTHS):
            return None
        numbers = self._compared(ids)
        measured = [(tokens, self._measure(ids, tokens)) for tokens in self._samples(numbers)]
        samples = [(t, v) for t, v in measured if v is not None and v.shape[0] in (1, len(t))]
        if len(samples) < len(measured):
            return None
        if InputKind.TOKEN_TYPE_IDS in self._added and all(not value.any() for _, value in samples):
            return self._added[InputKind.TOKEN_TYPE_IDS]
        if InputKind.POSITION_IDS not in self._added:
            return None
        for kind, pad in (("arange", None), *(("count_non_pad", n) for n in numbers)):
            offset = pad if pad is not None else int(samples[0][1].flat[0])
            if all(np.array_equal(np.broadcast_to(v, t.shape), _ids(kind, offset, pad, t)) for t, v in samples):
                found = Positions(kind, offset, pad, rows)
                return self._added[InputKind.POSITION_IDS] if self._holds(ids, found) and self._agree(found) else None
        return None

    def _holds(self, ids: relax.Expr, found: Positions) -> bool:
        """Whether the rule is that of a long sequence too: positions may be clipped, or begin again."""
        longest = min(found.longest, self.longest, _LONGEST)
        if longest < 1:
            return False
        tokens = np.random.default_rng(1).integers(2, 50, (1, longest))
        value = self._measure(ids, tokens)
        wanted = _ids(found.kind, found.offset, found.pad_id, tokens)
        return value is not None and np.array_equal(np.broadcast_to(value, tokens.shape), wanted)

    def _agree(self, found: Positions) -> bool:
        """Whether all positions of the graph follow one rule; it is kept, with the smallest table."""
        known = self.positions
        if known is None:
            self.positions = found
            return True
        if (known.kind, known.offset, known.pad_id) != (found.kind, found.offset, found.pad_id):
            return False
        self.positions = found if found.rows < known.rows else known
        return True

    def _compared(self, ids: relax.Expr) -> list[int]:
        """Numbers around those that the ids' computation compares with: one may be the padding's id."""
        found: dict[int, None] = {}
        for value in [value for _, value in cut(self, ids)[1]]:
            if not any(is_call(value, op) for op in _COMPARISONS):
                continue
            near = (0,) if is_call(value, "equal") or is_call(value, "not_equal") else (-1, 0, 1)
            known = [int(n) for n in map(scalar, value.args) if n is not None]
            found.update(dict.fromkeys(n + d for n in known for d in near if n + d >= 0))
        return list(found)

    def _samples(self, numbers: list[int]) -> list[np.ndarray]:
        """Token ids, and once for each number the same with it in the middle and at the end."""
        rng = np.random.default_rng(0)
        samples = [rng.integers(2, 50, (3, max(_LENGTHS)))]
        for number in numbers or [0]:
            tokens = samples[0].copy()
            tokens[:, 2] = number
            tokens[1, 4:] = number
            samples.append(tokens)
        return samples

    def _measure(self, ids: relax.Expr, tokens: np.ndarray) -> np.ndarray | None:
        ends = np.array(_LENGTHS)[:, None] if len(tokens) == len(_LENGTHS) else tokens.shape[1]
        mask = np.arange(tokens.shape[1])[None, :] < ends
        return self._evaluate(ids, {InputKind.TOKEN_IDS: tokens, InputKind.ATTENTION_MASK: mask}, tokens.shape)

    def _evaluate(self, expr: relax.Expr, given: Given, shape: tuple[int, int]) -> np.ndarray | None:
        """The value for these inputs, of (batch, length); None if it needs others."""
        dims = [d for d in shape_of(self.inputs.token_ids) if isinstance(d, tirx.Var)]

        def value_of(param: relax.Var) -> np.ndarray | None:
            kind = self.inputs.kind_of(param)
            value = None if kind is None else given.get(kind)
            return None if value is None else value.astype(str(param.ty.dtype))

        return evaluate(self, expr, dict(zip(dims, shape, strict=False)), value_of)


def _is_only(params: list[relax.Var], param: relax.Var) -> bool:
    return len(params) == 1 and params[0].same_as(param)


def _ids(kind: str, offset: int, pad: int | None, tokens: np.ndarray) -> np.ndarray:
    if kind == "arange":
        return np.broadcast_to(offset + np.arange(tokens.shape[1]), tokens.shape)
    real = tokens != pad
    return real.cumsum(1) * real + offset
