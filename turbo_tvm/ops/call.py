"""Operators in a graph: record to Relax call, and back.

An operator is a Relax call `R.call_dps_packed("turbo.<name>", (tensors..., R.str(text)), out)`; the text is JSON: the
names of the tensors, and the attributes that are not as by default. Relax functions with a `Composite` attribute, TVM's
other idiom, need a body in Relax operators, and ragged attention has none: where its sequences begin is data. A call
prints, parses and compares structurally like any other expression.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeVar

from tvm import ir, relax

from turbo_tvm.ops.operator import Operator

PREFIX = "turbo."
_CALL_DPS_PACKED = ir.Op.get("relax.call_dps_packed")

Found = TypeVar("Found", bound=Operator)


def to_call(operator: Operator) -> relax.Call:
    """Return the operator as a Relax call."""
    text = json.dumps({"tensors": [a.name for a in operator.arguments()], **operator.attributes()}, sort_keys=True)
    arguments = [*operator.tensors, ir.StringImm(text)]
    return relax.op.call_dps_packed(PREFIX + operator.NAME, arguments, out_ty=operator.out)


def match(expr: relax.Expr | None, kind: type[Found]) -> Found | None:
    """Return the operator that `expr` is a call of, or None if it is no call of this kind (`Operator` for any)."""
    if not isinstance(expr, relax.Call) or not expr.op.same_as(_CALL_DPS_PACKED):
        return None
    symbol = str(expr.args[0].global_symbol)
    found = kinds().get(symbol.removeprefix(PREFIX)) if symbol.startswith(PREFIX) else None
    if found is None or not issubclass(found, kind):
        return None
    *tensors, text = expr.args[1].fields
    plain = json.loads(text.value)
    named: dict[str, list[relax.Expr]] = {}
    for name, tensor in zip(plain.pop("tensors"), tensors, strict=True):
        named.setdefault(name, []).append(tensor)
    several = {f.name for f in dataclasses.fields(found) if f.metadata.get("several")}
    fields: dict[str, Any] = {name: tuple(v) if name in several else v[0] for name, v in named.items()}
    return found(**fields, **{key: as_tuples(value) for key, value in plain.items()}, out=expr.ty_args[0])


def operators(func: relax.Function) -> Iterator[Operator]:
    """Yield every operator that a function calls, in order."""
    for block in func.body.blocks:
        for binding in block.bindings:
            found = match(binding.value, Operator)
            if found is not None:
                yield found


def as_tuples(value: Any) -> Any:
    """Return a JSON value with tuples for its lists."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


@lru_cache(maxsize=1)
def kinds() -> dict[str, type[Operator]]:
    """Return every kind of operator by its name."""
    from turbo_tvm.ops import VOCABULARY

    return {kind.NAME: kind for kind in VOCABULARY}
