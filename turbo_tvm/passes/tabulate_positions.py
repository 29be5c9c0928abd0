"""Rows that a graph computes for every position, from nothing but its number, become a look-up.

    cos(arange(length) * frequencies) (1, length, d)      --> take(table (max_length, d), position_ids)

Exported graphs count positions themselves where PyTorch models take `position_ids`. The table is the same computation
for the longest sequence, once. That row j does not depend on how many rows there are is measured (see `evaluate.py`).
Applies to cosines and sines, from which rotary positions are made; anything else is left alone.
"""

from __future__ import annotations

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.ops.inputs import InputKind, Inputs, input_params, weight_params, with_params
from turbo_tvm.passes.analysis.evaluate import cut, evaluate, specialized
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of, terms_of

_SHORT = 5  # rows, to compare with those of the longest sequence


def tabulate_positions(mod: ir.IRModule, function: str, max_length: int) -> ir.IRModule:
    """Replace cosines and sines of counted positions by look-ups with the input position_ids, which is added.

    max_length: the longest sequence, in tokens. The module is returned as it was where there are none.
    """
    rewriter = _TabulatePositions(mod, function, max_length)
    done = rewriter.run()
    return done if rewriter.found else mod


class _TabulatePositions(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, max_length: int):
        super().__init__(mod, function)
        self.max_length = max_length
        inputs = Inputs.of(self.func)
        self.inputs = input_params(self.func)
        self.found = False
        self.terms = terms_of(self.func)
        self.position_ids = inputs.position_ids
        if self.position_ids is None and inputs.token_ids is not None:
            self.position_ids = relax.Var(InputKind.POSITION_IDS.parameter, inputs.token_ids.ty)
            params = [*self.inputs, self.position_ids, *weight_params(self.func)]
            self.func = with_params(self.func, params, len(self.inputs) + 1)

    def rules(self):
        return (self._turn,) if self.position_ids is not None else ()

    def _turn(self, call: relax.Call) -> relax.Expr | None:
        if not (is_call(call, "cos") or is_call(call, "sin")):
            return None
        dims = shape_of(self.current)
        batch, length = shape_of(self.position_ids)
        if (
            len(dims) < 2
            or (len(dims) == 2 and self.current not in self.terms)
            or dims[:-2] != [1] * (len(dims) - 2)
            or not isinstance(dims[-1], int)
        ):
            return None
        if isinstance(dims[-2], int) or not dims[-2].same_as(length):
            return None
        if any(param in self.inputs for param in cut(self, call)[0]) or not self._is_by_row(call):
            return None
        self.found = True
        whole = self.emit(specialized(self, call, self._dims(self.max_length), {}))
        table = self.emit(relax.op.reshape(whole, (self.max_length, dims[-1])))
        rows = self.emit(relax.op.take(table, self.position_ids, axis=0, mode="clip"))
        inner = [1] * (len(dims) - 3)
        return rows if len(dims) < 4 else relax.op.reshape(rows, (batch, *inner, length, dims[-1]))

    def _dims(self, length: int) -> dict[tirx.Var, int]:
        return dict(zip(shape_of(self.position_ids), (1, length), strict=True))

    def _is_by_row(self, call: relax.Call) -> bool:
        """Whether a row is that of its position, however many there are."""
        lengths = (min(_SHORT, self.max_length), self.max_length)
        short, long = (evaluate(self, call, self._dims(n), self._some) for n in lengths)
        if short is None or long is None:
            return False
        return np.allclose(short.reshape(lengths[0], -1), long.reshape(lengths[1], -1)[: lengths[0]], atol=1e-6)

    def _some(self, param: relax.Var) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.standard_normal([int(d) for d in shape_of(param)]).astype(str(param.ty.dtype))
