"""Lower every composite to a call of a kernel.

    R.call_dps_packed("turbo.linear", (x, w, b, R.str(attributes)), out)
        --> R.call_tir(linear_768x3072_gelu, (x, w, b), out)

Kernels are shared: a composite with the same attributes and column counts is the same kernel in every layer. Which
schedule that is belongs to the pipeline, which passes it in: passes know nothing of schedules.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import ir, relax, tirx

from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import substitute

Kernels = dict[tirx.PrimFunc, ir.GlobalVar]
Schedule = Callable[[composite.Composite, relax.Type], tuple[str, tirx.PrimFunc]]


def lower_kernels(mod: ir.IRModule, schedule: Schedule) -> ir.IRModule:
    """Replace composites in every function by `call_tir`.

    schedule: gives a composite's kernel, as a unique name and a PrimFunc that takes the composite's tensors and output.
    """
    builder = relax.BlockBuilder(ir.IRModule(attrs=mod.attrs))
    kernels: Kernels = {}
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function):
            _lower(builder, var.name_hint, func, schedule, kernels)
    lowered = builder.finalize()
    for var, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            lowered[var] = func
    return lowered


def _lower(builder, name: str, func: relax.Function, schedule: Schedule, kernels: Kernels) -> None:
    new: dict[relax.Var, relax.Expr] = {}
    with builder.function(name, list(func.params), attrs=dict(func.attrs or {})):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    value = substitute(binding.value, new)
                    fused = composite.match(value)
                    if fused is not None:
                        value = _call(builder, fused, value.ty_args[0], schedule, kernels)
                    new[binding.var] = builder.emit(value)
            out = builder.emit_output(substitute(func.body.body, new))
        builder.emit_func_output(out)


def _call(builder, fused: composite.Composite, out: relax.Type, schedule: Schedule, kernels: Kernels) -> relax.Call:
    name, kernel = schedule(fused, out)
    if kernel not in kernels:
        kernels[kernel] = builder.add_func(kernel, name)  # the builder makes the name unique
    return relax.op.call_tir(kernels[kernel], list(fused.tensors), out_ty=out)
