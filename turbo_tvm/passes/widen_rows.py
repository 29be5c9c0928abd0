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

import numpy as np
from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.lower_precision import BF16
from turbo_tvm.passes.rewriter import Rewriter, dims_of, shape_of

PAGE_BYTES = 4096
LINE_BYTES = 64
_WIDENED = frozenset(
    ["linear", "attention", "norm", "embedding", "gate", "rotary"]
)  # kernels that can write wider rows


def widen_rows(mod: ir.IRModule, amx: bool = False) -> ir.IRModule:
    """Add a cache line to the rows of activations between composites whose width is a multiple of a page.

    amx: also to bf16 rows of an even number of lines.
    """
    return _WidenRows(mod, amx).run()


class _WidenRows(Rewriter):
    def __init__(self, mod: ir.IRModule, amx: bool):
        super().__init__(mod)
        self._bf16_bytes = 2 * LINE_BYTES if amx else PAGE_BYTES
        self._fixed = composite.read_by_operators(self.func)

    def rules(self):
        return (self._widen,)

    def _widen(self, call: relax.Call) -> relax.Expr | None:
        fused = composite.match(call)
        if fused is None or fused.name not in _WIDENED:
            return None
        attrs, out = dict(fused.attrs), call.ty_args[0]
        if fused.name == "attention":
            offsets = [offset for _, offset in attrs["columns"]]
            widths = [int(shape_of(x)[-1]) for x in fused.tensors[:3]]
            attrs["columns"] = [list(pair) for pair in zip(widths, offsets, strict=True)]
        *rows, columns = dims_of(out)
        itemsize = np.dtype(str(out.dtype)).itemsize
        multiple = self._bf16_bytes if str(out.dtype) == BF16 else PAGE_BYTES
        if self.current not in self._fixed and columns * itemsize % multiple == 0:
            out = relax.TensorType((*rows, columns + LINE_BYTES // itemsize), out.dtype)
            if fused.name == "linear":
                attrs["columns"] = columns
        return composite.Composite(fused.name, fused.tensors, attrs).call(out)
