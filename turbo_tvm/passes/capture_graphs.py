"""Add a twin of a function that replays its kernels as one CUDA graph: one launch in place of dozens.

    encode(x, w, buffers)         { kernel_1(...); kernel_2(...); ... }
        --> encode                as it was, and
            encode_captured(...)    { run_or_capture(lifted function of the same kernels, ..., shape); ... }

TVM's own rewrite does the work; it captures what depends on nothing that a later call may change. Here that is
everything: weights, buffers and inputs all lie where they lay when a batch of that shape ran before, and so do the
results, which the twin does not return. Whoever calls it sees to that. Runs on the lowered function, after memory is
planned.
"""

from __future__ import annotations

import tvm
from tvm import ir, relax, tirx

from turbo_tvm.ops.inputs import NUM_INPUT
from turbo_tvm.ops.operand import dims


def captured(function: str) -> str:
    """Return the name of a function's twin."""
    return f"{function}_captured"


def capture_graphs(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Return the module with the twin beside the function."""
    main, name = mod[function], captured(function)
    # TVM 0.27 cannot run a function that returns nothing, and a captured one returns what is read outside of it.
    last = main.params[-1]
    read, shape = relax.Var("last", last.ty), relax.Var("shape", relax.ShapeType(ndim=len(dims(last))))
    size = relax.Call(relax.ExternFunc("vm.builtin.shape_of"), [read], ty_args=[shape.ty])
    end = relax.BindingBlock([relax.VarBinding(read, last), relax.VarBinding(shape, size)])
    body = relax.SeqExpr([*main.body.blocks, end], shape)
    twin = relax.Function(main.params, body, shape.ty, is_pure=False, attrs=main.attrs)
    # Without inputs, every parameter counts as fixed.
    twin = twin.with_attr(NUM_INPUT, 0).with_attr("global_symbol", name)
    kernels = {var: func for var, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    alone = ir.IRModule({**kernels, ir.GlobalVar(name): relax.utils.copy_with_new_vars(twin)}, attrs=mod.attrs)
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        alone = relax.transform.RewriteCUDAGraph()(alone)
    functions = dict(mod.functions_items())
    functions.update({var: func for var, func in alone.functions_items() if isinstance(func, relax.Function)})
    return ir.IRModule(functions, attrs=mod.attrs)
