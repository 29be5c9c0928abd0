"""Mark every kernel as free of aliases.

TVM 0.27 compiles a whole module by the mark of the function it declared last. Its own shape function has none, and
attention then runs five times slower. It has a single buffer, and every other function is given distinct outputs, or
one in the place of an input that the task that writes an element has read before (`ops.operator.OVERWRITES`).
"""

from __future__ import annotations

from tvm import ir, tirx


def mark_no_alias(mod: ir.IRModule) -> ir.IRModule:
    """Return the module with `tirx.noalias` on every PrimFunc."""
    functions = {
        var: func.with_attr("tirx.noalias", True) if isinstance(func, tirx.PrimFunc) else func
        for var, func in mod.functions_items()
    }
    return ir.IRModule(functions, attrs=mod.attrs)
