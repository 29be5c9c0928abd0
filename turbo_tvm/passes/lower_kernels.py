"""Lower every operator of ours to a call of a kernel.

    R.call_dps_packed("turbo.linear", (x, w, b, R.str(attributes)), out)
        --> R.call_tir(linear_768x3072_gelu, (x, w, b), out)

Kernels are shared: an operator with the same attributes and column counts is the same kernel in every layer. Which
schedule that is belongs to the compiler, which passes it in: passes know nothing of schedules. `call_kernels` does the
same for kernels that are compiled outside the module.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import ir, relax, tirx

from turbo_tvm.ops import Operator
from turbo_tvm.ops.call import match
from turbo_tvm.passes.rewriter import substitute

Kernels = Callable[[Operator], tuple[str, tirx.PrimFunc]]
Lower = Callable[[Operator], relax.Call]


def lower_kernels(mod: ir.IRModule, kernels: Kernels) -> ir.IRModule:
    """Replace our operators in every function by `call_tir`.

    kernels: gives an operator's kernel, as a unique name and a PrimFunc that takes the operator's tensors and output.
    """
    builder = relax.BlockBuilder(ir.IRModule(attrs=mod.attrs))
    added: dict[tirx.PrimFunc, ir.GlobalVar] = {}

    def lower(operator: Operator) -> relax.Call:
        name, kernel = kernels(operator)
        if kernel not in added:
            added[kernel] = builder.add_func(kernel, name)  # the builder makes the name unique
        return relax.op.call_tir(added[kernel], list(operator.tensors), out_ty=operator.out)

    return replace_operators(mod, builder, lower)


def replace_operators(mod: ir.IRModule, builder: relax.BlockBuilder, lower: Lower) -> ir.IRModule:
    """Return the module with its Relax functions rebuilt in the builder, what `lower` returns in place of operators."""
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function):
            _rebuild(builder, var.name_hint, func, lower)
    lowered = builder.finalize()
    for var, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            lowered[var] = func
    return lowered


def _rebuild(builder: relax.BlockBuilder, name: str, func: relax.Function, lower: Lower) -> None:
    new: dict[relax.Var, relax.Expr] = {}
    with builder.function(name, list(func.params), attrs=dict(func.attrs or {})):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    value = substitute(binding.value, new)
                    operator = match(value, Operator)
                    new[binding.var] = builder.emit(value if operator is None else lower(operator))
            out = builder.emit_output(substitute(func.body.body, new))
        builder.emit_func_output(out)
