"""Run a part of the graph on sample inputs: what an expression means is measured, not guessed from its spelling.

Attention biases and pooling weights are spelt in many ways (subtract and multiply, where, clamp, bucketed distances).
What matters is their value for given masks, so the passes cut the expression out, compile it with TVM's stock
schedules for the host and look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax, tirx

from turbo_tvm.passes.rewriter import Rewriter, is_tensor, substitute


def cut(
    rewriter: Rewriter, expr: relax.Expr, given: Sequence[relax.Var] = ()
) -> tuple[list[relax.Var], list[tuple[relax.Var, relax.Expr]]]:
    """The parameters that `expr` depends on, and the bindings that compute it, in order.

    given: variables that count as parameters; what computes them is left out.
    """
    pending, needed = _tensors(expr), set()
    while pending:  # a recursion would be as deep as the model
        var = pending.pop()
        if var not in needed and var in rewriter.bound and var not in given:
            pending.extend(_tensors(rewriter.bound[var]))
        needed.add(var)
    params = [param for param in (*given, *rewriter.func.params) if param in needed]
    return params, [(var, value) for var, value in rewriter.bound.items() if var in needed and var not in given]


def _tensors(expr: relax.Expr) -> list[relax.Var]:
    return [var for var in relax.analysis.free_vars(expr) if is_tensor(var)]


def concrete(
    rewriter: Rewriter, expr: relax.Expr, dims: Mapping[tirx.Var, int], given: Sequence[relax.Var] = ()
) -> relax.Function:
    """`expr` as a function of the parameters it depends on, as `cut` has it, with symbolic dimensions fixed."""
    params, bindings = cut(rewriter, expr, given)
    builder = relax.BlockBuilder()
    with builder.function("part", params):
        with builder.dataflow():
            new: dict[relax.Var, relax.Expr] = {}
            for var, value in bindings:
                new[var] = builder.emit(substitute(value, new))
            out = builder.emit_output(substitute(expr, new))
        builder.emit_func_output(out)
    func = builder.finalize()["part"]
    present = {v: n for v, n in dims.items() if any(v.same_as(f) for f in relax.analysis.defined_symbolic_vars(func))}
    return func.bind_symbolic_vars(present) if present else func


def evaluate(
    rewriter: Rewriter,
    expr: relax.Expr,
    dims: Mapping[tirx.Var, int],
    value_of: Callable[[relax.Var], np.ndarray | None],
    given: Sequence[relax.Var] = (),
) -> np.ndarray | None:
    """The value of `expr` when `value_of` gives its parameters' values, parameters as `cut` has it.

    None if a parameter has none, or if a symbolic dimension is not among `dims`.
    """
    values = [value_of(param) for param in cut(rewriter, expr, given)[0]]
    if any(value is None for value in values):
        return None
    func = concrete(rewriter, expr, dims, given)
    if relax.analysis.free_symbolic_vars(func):
        return None
    mod = tvm.IRModule({"part": func.with_attr("global_symbol", "part")})
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return machine["part"](*[tvm.runtime.tensor(value) for value in values]).numpy()


def inline(
    rewriter: Rewriter,
    expr: relax.Expr,
    dims: Mapping[tirx.Var, int],
    values: Mapping[relax.Var, relax.Expr],
    given: Sequence[relax.Var] = (),
) -> relax.Expr:
    """Emit `expr` once more with symbolic dimensions fixed, and with `values` in the place of some parameters."""
    params, _ = cut(rewriter, expr, given)
    func = concrete(rewriter, expr, dims, given)
    new: dict[relax.Var, relax.Expr] = {
        inner: values.get(outer, outer) for inner, outer in zip(func.params, params, strict=True)
    }
    for block in func.body.blocks:
        for binding in block.bindings:
            new[binding.var] = rewriter.emit(substitute(binding.value, new))
    return substitute(func.body.body, new)
