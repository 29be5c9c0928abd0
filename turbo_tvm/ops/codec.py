"""Operators without a graph as plain data, for manifests and tuning logs, and back.

    {"operator": "linear", "x": [[null, 4, 768], "float32"], ..., "activation": "gelu"}

Attributes that are as by default are left out, so that a new one with a default changes no old text.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from typing import Any

from turbo_tvm.ops.call import as_tuples, kinds
from turbo_tvm.ops.operand import Operand
from turbo_tvm.ops.operator import Operator


def to_plain(operator: Operator) -> dict[str, Any]:
    """Return an operator whose tensors are operands as a JSON object."""
    plain: dict[str, Any] = {"operator": operator.NAME, "out": _plain(operator.out)}
    for field in dataclasses.fields(operator):
        value = getattr(operator, field.name)
        if "role" in field.metadata and value is not None:
            plain[field.name] = _plain(value)
    return plain | {name: _plain(value) for name, value in operator.attributes().items()}


def from_plain(plain: Any) -> Operator:
    """Return the operator that `to_plain` made this of. Raises ValueError for anything else."""
    if not isinstance(plain, dict) or not isinstance(plain.get("operator"), str):
        raise ValueError("no operator")
    kind = kinds().get(plain["operator"])
    if kind is None:
        raise ValueError(f"there is no operator {reprlib.repr(plain['operator'])}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in plain.items():
        if name == "operator":
            continue
        if name not in fields:
            raise ValueError(f"{kind.NAME} has no field {reprlib.repr(name)}")
        values[name] = _value(fields[name], hints[name], value)
    try:
        return kind(**values)
    except TypeError as error:  # a field is missing
        raise ValueError(str(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Operand):
        return [list(value.shape), value.dtype]
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _value(field: dataclasses.Field, hint: Any, plain: Any) -> Any:
    if field.name != "out" and "role" not in field.metadata:
        if not _fits(plain, hint):  # before anything walks through it: it may be nested without end
            raise ValueError(f"{field.name} cannot be {reprlib.repr(plain)}")
        return as_tuples(plain)
    if field.metadata.get("several"):
        if not isinstance(plain, list):
            raise ValueError(f"{field.name} is a list of tensors, not {reprlib.repr(plain)}")
        return tuple(_operand(field.name, item) for item in plain)
    return _operand(field.name, plain)


def _operand(name: str, plain: Any) -> Operand:
    """Return an operand. Raises ValueError unless it is [[dimensions], dtype]."""
    fits = isinstance(plain, list) and len(plain) == 2 and isinstance(plain[0], list) and isinstance(plain[1], str)
    if not fits or not all(d is None or (type(d) is int and d > 0) for d in plain[0]):
        raise ValueError(f"{name} is no tensor: {reprlib.repr(plain)}")
    return Operand(tuple(plain[0]), plain[1])


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value is of an annotated type: a plain one, a tuple (a list there), or alternatives."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if origin is tuple:
        if not isinstance(value, list):
            return False
        of = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        return len(of) == len(value) and all(_fits(item, each) for item, each in zip(value, of, strict=True))
    return value is None if hint is type(None) else type(value) is hint
