"""Lower every operator of ours to a call of a kernel outside the module, which is linked in later.

    R.call_dps_packed("turbo.linear", (x, w, b, R.str(attributes)), out)
        --> R.call_dps_packed("linear_768x3072_gelu", (x, w, b), out)

As `lower_kernels`, but what a kernel's code is need not be known: it may have been compiled before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

from tvm import ir, relax

from turbo_tvm.ops import Operator
from turbo_tvm.passes.lower_kernels import replace_operators


class Named(Hashable, Protocol):
    """A kernel as data; equal ones are the same kernel."""

    @property
    def name(self) -> str:
        """What it is called, if no other kernel is."""


Kernel = TypeVar("Kernel", bound=Named)


def call_kernels(mod: ir.IRModule, choose: Callable[[Operator], Kernel]) -> tuple[ir.IRModule, dict[str, Kernel]]:
    """Replace our operators in every function by `call_dps_packed`.

    choose: gives an operator's kernel, which takes the operator's tensors and output.

    Returns the module, and the kernels by the names that it calls them by.
    """
    symbols: dict[Kernel, str] = {}
    taken = {var.name_hint for var in mod.get_global_vars()}

    def lower(operator: Operator) -> relax.Call:
        kernel = choose(operator)
        if kernel not in symbols:
            symbols[kernel] = _unique(kernel.name, taken)
            taken.add(symbols[kernel])
        return relax.op.call_dps_packed(symbols[kernel], list(operator.tensors), out_ty=operator.out)

    lowered = replace_operators(mod, relax.BlockBuilder(ir.IRModule(attrs=mod.attrs)), lower)
    return lowered, {symbol: kernel for kernel, symbol in symbols.items()}


def _unique(name: str, taken: set[str]) -> str:
    names = (f"{name}_{number}" if number else name for number in itertools.count())
    return next(candidate for candidate in names if candidate not in taken)
