"""From a PyTorch module with fixed inputs to Relax, through `torch.export` with symbolic batch and length."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import tvm
from torch import nn
from tvm import ir, relax
from tvm.relax.frontend.torch import from_exported_program

from turbo_tvm.passes.rewriter import builder_without_main, shape_of, substitute

_KEPT_WHOLE = ("scaled_dot_product_attention", "linear", "layer_norm", "gelu", "matmul", "softmax")


def to_relax(
    module: nn.Module, names: tuple[str, ...], example: tuple[torch.Tensor, ...], max_length: int
) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
    """`main(inputs..., weights...)` and the weights' values. Raises whatever PyTorch and TVM raise.

    names, example: the module's inputs, all of them (batch, length) int64, neither of them 1.
    """
    program = _export(module, example, max_length)
    mod = from_exported_program(
        program,
        keep_params_as_input=True,
        unwrap_unit_return_tuple=True,
        custom_convert_map={"repeat.default": _repeat},
        run_ep_decomposition=False,
    )
    mod, params = relax.frontend.detach_params(mod)
    return _name_inputs(mod, names), list(params["main"])


def _export(module: nn.Module, example: tuple[torch.Tensor, ...], max_length: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    # the example must be allowed too; shorter limits are the runtime's to check
    length = torch.export.Dim("length", min=1, max=max(max_length, example[0].shape[1]))
    shapes = (tuple({0: batch, 1: length} for _ in example),)
    table = torch.export.default_decompositions()
    for op in list(table):
        if str(op).split(".")[1] in _KEPT_WHOLE:  # "aten.linear.default"
            table.pop(op)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, example, dynamic_shapes=shapes).run_decompositions(table)


def _repeat(node: torch.fx.Node, importer: Any) -> relax.Expr:
    """`x.repeat(...)` by broadcasting: TVM's own tile takes no symbolic count."""
    x, *counts = importer.retrieve_args(node)
    counts = counts[0] if isinstance(counts[0], tuple | list) else counts
    shape = [1] * (len(counts) - len(shape_of(x))) + shape_of(x)
    pairs = list(zip(counts, shape, strict=True))
    emit = importer.block_builder.emit
    apart = emit(relax.op.reshape(x, [d for size in shape for d in (1, size)]))
    wide = emit(relax.op.broadcast_to(apart, [d for pair in pairs for d in pair]))
    return emit(relax.op.reshape(wide, [count * size for count, size in pairs]))


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
