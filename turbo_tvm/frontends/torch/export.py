"""Bring a PyTorch module with fixed inputs to Relax, through `torch.export` with symbolic batch and length."""

from __future__ import annotations

import warnings

import torch
import tvm
from torch import nn
from tvm import ir, relax
from tvm.relax.frontend.torch import from_exported_program

from turbo_tvm.frontends.torch.decompose import decompose
from turbo_tvm.frontends.torch.operators import CONVERTERS
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import NUM_INPUT, InputKind
from turbo_tvm.passes.rewriter import builder_without, substitute
from turbo_tvm.tvm_compat import EXPORTED


def to_relax(
    module: nn.Module, kinds: tuple[InputKind, ...], example: tuple[torch.Tensor, ...], max_length: int | None
) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
    """Return `main(inputs..., weights...)` and the weights' values. Raises whatever PyTorch and TVM raise.

    kinds: of the module's inputs, in order.
    example: those inputs, int64 (batch, length), neither of them 1. With max_length None they are of any shape and
        dtype, and the batch alone stays symbolic.
    max_length: the longest sequence, in tokens.
    """
    program = _export(module, example, max_length)
    mod = from_exported_program(
        program,
        keep_params_as_input=True,
        unwrap_unit_return_tuple=True,
        run_ep_decomposition=False,
        custom_convert_map=dict(CONVERTERS),
    )
    mod, params = relax.frontend.detach_params(mod)
    return _name_inputs(mod, kinds), list(params[EXPORTED])


def _export(
    module: nn.Module, example: tuple[torch.Tensor, ...], max_length: int | None
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    dims = {0: batch}
    if max_length is not None:  # the example must be allowed too; shorter limits are the runtime's to check
        dims[1] = torch.export.Dim("length", min=1, max=max(max_length, example[0].shape[1]))
    shapes = (tuple(dims for _ in example),)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return decompose(torch.export.export(module, example, dynamic_shapes=shapes))


def _name_inputs(mod: ir.IRModule, kinds: tuple[InputKind, ...]) -> ir.IRModule:
    """Return the function under our name, its inputs named by kind, its weights without the exporter's prefix."""
    func, names = mod[EXPORTED], [kind.parameter for kind in kinds]
    weights = [p.name.removeprefix("p_").removeprefix("model_") for p in func.params[len(names) :]]
    params = [relax.Var(name, p.ty) for name, p in zip([*names, *weights], func.params, strict=True)]
    new: dict[relax.Var, relax.Expr] = dict(zip(func.params, params, strict=True))
    builder = builder_without(mod, EXPORTED)
    with builder.function(ENCODE, params, attrs={NUM_INPUT: len(names)}):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    new[binding.var] = builder.emit(substitute(binding.value, new))
            out = builder.emit_output(substitute(func.body.body, new))
        builder.emit_func_output(out)
    return builder.finalize()
