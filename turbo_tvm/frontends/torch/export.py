"""From a PyTorch module with fixed inputs to Relax, through `torch.export` with symbolic batch and length."""

from __future__ import annotations

import warnings

import torch
import tvm
from torch import nn
from tvm import ir, relax
from tvm.relax.frontend.torch import from_exported_program

from turbo_tvm.frontends.torch.operators import CONVERTERS
from turbo_tvm.passes.rewriter import builder_without_main, substitute

_KEPT_WHOLE = ("scaled_dot_product_attention", "linear", "layer_norm", "gelu", "matmul", "softmax")


def to_relax(
    module: nn.Module, names: tuple[str, ...], example: tuple[torch.Tensor, ...], max_length: int | None
) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
    """`main(inputs..., weights...)` and the weights' values. Raises whatever PyTorch and TVM raise.

    names, example: the module's inputs, all of them (batch, length) int64, neither of them 1; with max_length None of
        any shape and type, of which the batch alone stays symbolic.
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
    return _name_inputs(mod, names), list(params["main"])


def _export(
    module: nn.Module, example: tuple[torch.Tensor, ...], max_length: int | None
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    dims = {0: batch}
    if max_length is not None:  # the example must be allowed too; shorter limits are the runtime's to check
        dims[1] = torch.export.Dim("length", min=1, max=max(max_length, example[0].shape[1]))
    shapes = (tuple(dims for _ in example),)
    table = torch.export.default_decompositions()
    for op in list(table):
        if str(op).split(".")[1] in _KEPT_WHOLE:  # "aten.linear.default"
            table.pop(op)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, example, dynamic_shapes=shapes).run_decompositions(table)


def _name_inputs(mod: ir.IRModule, names: tuple[str, ...]) -> ir.IRModule:
    """Give `main`'s inputs their names, and its weights theirs without the exporter's prefix."""
    func = mod["main"]
    weights = [p.name.removeprefix("p_").removeprefix("model_") for p in func.params[len(names) :]]
    params = [relax.Var(name, p.ty) for name, p in zip([*names, *weights], func.params, strict=True)]
    new: dict[relax.Var, relax.Expr] = dict(zip(func.params, params, strict=True))
    builder = builder_without_main(mod)
    with builder.function("main", params, attrs={"num_input": len(names)}):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    new[binding.var] = builder.emit(substitute(binding.value, new))
            out = builder.emit_output(substitute(func.body.body, new))
        builder.emit_func_output(out)
    return builder.finalize()
