"""Widen activations whose rows lie so far apart that they meet in few sets of a first-level cache.

    y (t, R, 3072) = linear(x, w, b); linear(y, w2, b2)
        --> y (t, R, 3088) = linear(x, w, b) columns 3072; linear(y, w2, b2)

The matrix kernel reads R rows side by side. With a distance of a multiple of 4096 bytes between them, all R lines fall
into one set of a first-level cache and drive each other and the weights out: measured on Zen 5 at 3072 columns, 330 in
place of 460 GFLOP/s on two cores. One cache line more per row spreads them.

A tile of Intel AMX is 16 rows, loaded in one go, and all 16 are in sets of their own if the distance is an odd number
of lines: bf16 rows of an even number get one more there. Measured on Emerald Rapids, without and with it in turn:
BERT-base 1.055 and MiniLM-L6 1.059 times as fast over the grid of the encoder benchmark.

Kernels take rows of any width; outputs of the model, and what TVM's own operators read or write, keep theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import ir, relax

from turbo_tvm.ops import Attention, Embedding, Gate, Linear, Norm, Operator, Rotary
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.ops.formats import BF16, LINE_BYTES, PAGE_BYTES
from turbo_tvm.ops.operand import dims
from turbo_tvm.passes.rewriter import Rewriter, read_by_others

_WIDENED = (Linear, Attention, Norm, Embedding, Gate, Rotary)  # kernels that can write wider rows


def widen_rows(mod: ir.IRModule, function: str, amx: bool = False) -> ir.IRModule:
    """Add a cache line to the rows of activations between operators whose width is a multiple of a page.

    amx: also to bf16 rows of an even number of lines.
    """
    return _WidenRows(mod, function, amx).run()


class _WidenRows(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, amx: bool):
        super().__init__(mod, function)
        self._bf16_bytes = 2 * LINE_BYTES if amx else PAGE_BYTES
        self._fixed = read_by_others(self.func)

    def rules(self):
        return (self._widen,)

    def _widen(self, call: relax.Call) -> relax.Expr | None:
        found = match(call, Operator)
        if not isinstance(found, _WIDENED) or self.current in self._fixed:
            return None
        *rows, columns = dims(found.out)
        dtype = str(found.out.dtype)
        itemsize = np.dtype(dtype).itemsize
        multiple = self._bf16_bytes if dtype == BF16.storage else PAGE_BYTES
        if columns * itemsize % multiple:
            return None
        changed: dict[str, Any] = {"out": relax.TensorType((*rows, columns + LINE_BYTES // itemsize), dtype)}
        if isinstance(found, Linear):  # whose columns nothing else tells
            changed["columns"] = columns
        return to_call(replace(found, **changed))
