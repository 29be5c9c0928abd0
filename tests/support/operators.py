"""What tests of passes ask of a graph: which operators it has, in order; and a short way to build one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tvm import ir, relax

from turbo_tvm.ops import Operator
from turbo_tvm.ops.call import match, operators

Found = TypeVar("Found", bound=Operator)
Emit = Callable[[relax.Expr], relax.Var]


def operators_of(mod: ir.IRModule, kind: type[Found] = Operator, name: str = "main") -> list[Found]:
    """Return the operators of one kind (`Operator`: of all) that a function calls, in order."""
    return [found for found in operators(mod[name]) if isinstance(found, kind)]


def names_of(mod: ir.IRModule, name: str = "main") -> list[str]:
    """Return the names of the operators that a function calls, in order."""
    return [found.NAME for found in operators_of(mod, name=name)]


def others_of(mod: ir.IRModule, name: str = "main") -> list[str]:
    """Return the names of the Relax operators that a function calls beside ours, such as "relax.add", in order."""
    values = values_of(mod, name)
    return [v.op.name for v in values if isinstance(v, relax.Call) and match(v, Operator) is None]


def values_of(mod: ir.IRModule, name: str = "main") -> list[relax.Expr]:
    """Return what a function binds, in order."""
    return [binding.value for block in mod[name].body.blocks for binding in block.bindings]


def module_of(
    params: Sequence[relax.Var], body: Callable[..., relax.Expr], inputs: int = 1, name: str = "main"
) -> ir.IRModule:
    """Return a module whose function returns `body(emit, *params)`; the first `inputs` parameters are its inputs."""
    builder = relax.BlockBuilder()
    with builder.function(name, list(params), attrs={"num_input": inputs}):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, *params))
        builder.emit_func_output(out)
    return builder.finalize()
