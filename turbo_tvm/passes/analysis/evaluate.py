"""Run a part of the graph on sample inputs: what an expression means is measured, not guessed from its spelling.

Attention biases and pooling weights are spelt in many ways (subtract and multiply, where, clamp, bucketed distances).
What matters is their value for given masks, so the passes cut the expression out, compile it with TVM's stock
schedules for the host and look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from turbo_tvm.passes.rewriter import Rewriter, is_call, is_tensor, shape_of, substitute

_PART = "part"
_FUSE = tvm.transform.Sequential(
    [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
)


def cut(
    rewriter: Rewriter, expr: relax.Expr, at: Sequence[relax.Var] = ()
) -> tuple[list[relax.Var], list[tuple[relax.Var, relax.Expr]]]:
    """The parameters that `expr` depends on, and the bindings that compute it, in order.

    at: variables that count as parameters; what computes them is left out.
    """
    pending, needed = _tensors(expr), set()
    while pending:  # a recursion would be as deep as the model
        var = pending.pop()
        if var not in needed and var in rewriter.bound and var not in at:
            pending.extend(_tensors(rewriter.bound[var]))
        needed.add(var)
    params = [param for param in dict.fromkeys((*at, *rewriter.func.params)) if param in needed]
    return params, [(var, value) for var, value in rewriter.bound.items() if var in needed and var not in at]


def _tensors(expr: relax.Expr) -> list[relax.Var]:
    return [var for var in relax.analysis.free_vars(expr) if is_tensor(var)]


def is_arange(value: relax.Expr, length: tirx.Var) -> bool:
    """Whether `value` is 0, 1, 2, ... length - 1."""
    if not is_call(value, "arange"):
        return False
    start, end, step = value.args
    return (
        all(isinstance(v, tirx.IntImm) for v in (start, step))
        and (int(start), int(step)) == (0, 1)
        and (end.same_as(length))
    )


def concrete(
    rewriter: Rewriter,
    expr: relax.Expr,
    dims: Mapping[tirx.Var, int],
    positions: np.ndarray | None = None,
    at: Sequence[relax.Var] = (),
) -> relax.Function:
    """`expr` as a function of the parameters it depends on, as `cut` has it, with symbolic dimensions fixed.

    positions: what takes the place of 0, 1, 2, ... of as many elements. at: as in `cut`. What depends on a dimension
    alone gets the first input that has it as a last parameter.
    """
    params, bindings = cut(rewriter, expr, at)
    params = [*params, *_carriers(rewriter, params, dims)]
    new: dict[relax.Var, relax.Expr] = {param: relax.Var(param.name, param.ty) for param in params}
    builder = relax.BlockBuilder()
    with builder.function("part", [new[param] for param in params]):
        with builder.dataflow():
            for var, value in bindings:
                if positions is not None and any(is_arange(value, dim) for dim in dims):
                    value = relax.const(positions, str(var.ty.dtype))  # which makes int32 of int64, unasked
                new[var] = builder.emit(substitute(value, new))
            out = builder.emit_output(substitute(expr, new))
        builder.emit_func_output(out)
    func = builder.finalize()["part"]
    present = {v: n for v, n in dims.items() if any(v.same_as(f) for f in relax.analysis.defined_symbolic_vars(func))}
    return func.bind_symbolic_vars(present) if present else func


def _carriers(rewriter: Rewriter, params: list[relax.Var], dims: Mapping[tirx.Var, int]) -> list[relax.Var]:
    """Inputs that have the dimensions that no parameter has."""
    missing = [d for d in dims if not any(_has(p, d) for p in params)]
    return [p for p in rewriter.func.params if any(_has(p, d) for d in missing)][:1]


def _has(param: relax.Var, dim: tirx.Var) -> bool:
    return any(not isinstance(d, int) and d.same_as(dim) for d in shape_of(param))


def specialized(
    rewriter: Rewriter,
    expr: relax.Expr,
    dims: Mapping[tirx.Var, int],
    values: Mapping[relax.Var, relax.Expr],
    positions: np.ndarray | None = None,
    at: Sequence[relax.Var] = (),
) -> relax.Expr:
    """Emit `expr` once more with symbolic dimensions fixed, and with `values` in the place of some parameters."""
    params, _ = cut(rewriter, expr, at)
    func = concrete(rewriter, expr, dims, positions, at)
    outer = [*params, *_carriers(rewriter, params, dims)]
    new: dict[relax.Var, relax.Expr] = {i: values.get(o, o) for i, o in zip(func.params, outer, strict=True)}
    for block in func.body.blocks:
        for binding in block.bindings:
            new[binding.var] = rewriter.emit(substitute(binding.value, new))
    return substitute(func.body.body, new)


def evaluate(
    rewriter: Rewriter,
    expr: relax.Expr,
    dims: Mapping[tirx.Var, int],
    value_of: Callable[[relax.Var], np.ndarray | None],
    positions: np.ndarray | None = None,
    at: Sequence[relax.Var] = (),
) -> Any:
    """The value of `expr`, an array, or a list of them for a tuple, when `value_of` gives its parameters' values.

    positions, at: as in `concrete`.

    None if a parameter has none, or if a symbolic dimension is not among `dims`.
    """
    values = [value_of(param) for param in cut(rewriter, expr, at)[0]]
    if any(value is None for value in values):
        return None
    func = concrete(rewriter, expr, dims, positions, at)
    if relax.analysis.free_symbolic_vars(func) or any(not isinstance(d, int) for p in func.params for d in shape_of(p)):
        return None
    values += [np.zeros([int(d) for d in shape_of(p)], str(p.ty.dtype)) for p in func.params[len(values) :]]
    part = tvm_ffi.StructuralKey(func)  # type: ignore[call-arg]  # its stub has the constructor of C++
    machine = relax.VirtualMachine(_library(part), tvm.cpu())
    result = machine[_PART](*[tvm.runtime.tensor(value) for value in values])
    return [part.numpy() for part in result] if isinstance(expr, relax.Tuple) else result.numpy()


@lru_cache(maxsize=64)
def _library(part: tvm_ffi.StructuralKey) -> tvm.runtime.Module:
    """Compile a function that has all dimensions fixed; the same part of another layer or model is compiled once.

    Nearly all of its cost is machine code, so few kernels and no optimisation: it runs once on a handful of numbers.
    """
    mod = _FUSE(tvm.IRModule({_PART: part.key.with_attr("global_symbol", _PART)}))
    return tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "opt-level": 0})).jit()


def equals_for_masks(
    rewriter: Rewriter, mask: relax.Var, expr: relax.Expr, expected: Callable[[np.ndarray], np.ndarray]
) -> bool:
    """Whether `expr` depends on the attention mask alone and is `expected` of it, up to broadcasting.

    mask: the input.
    """
    if not all(isinstance(d, tirx.Var) for d in shape_of(mask)):
        return False
    sample = (np.arange(7)[None, :] < np.array([[7], [3], [1]])).astype("int64")

    def value_of(param: relax.Var) -> np.ndarray | None:
        return sample.astype(str(param.ty.dtype)) if param.same_as(mask) else None

    value = evaluate(rewriter, expr, dict(zip(shape_of(mask), sample.shape, strict=True)), value_of)
    wanted = expected(sample)
    if not isinstance(value, np.ndarray) or value.ndim != wanted.ndim:
        return False
    if any(w not in (1, v) for v, w in zip(value.shape, wanted.shape, strict=True)):
        return False
    return bool((value == np.broadcast_to(wanted, value.shape)).all())
