"""Strict decoding: plain JSON values to frozen dataclasses, by their annotations.

A value must have exactly the annotated fields and types; else an ArtifactError names the first field that is wrong.
Supported are dataclasses, `int` (64 bits; `Annotated[int, least]`), `float` (finite), `str`, `bool`, `Literal` of
strings, `X | None`, `tuple[X, ...]` and `dict[str, X]`.
"""

import dataclasses
import math
import reprlib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from turbo_tvm.errors import ArtifactError

__all__ = ["AGAIN", "record_of", "show", "wrong_field"]

AGAIN = "compile the model again"

# Cuts long and deeply nested values short in messages, since a value may come from a hostile file.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
show = _SHORT.repr


def record_of(kind: Any, value: Any, where: str) -> Any:
    """Make the frozen dataclass `kind` from a mapping with exactly its fields; `where` is its path, for messages."""
    if not isinstance(value, Mapping):
        raise wrong_field(where, "an object", value)
    fields = {item.name: item.type for item in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in fields:
        if name not in value:
            raise ArtifactError(f"manifest field {prefix}{name} is missing: {AGAIN}")
    for name in value:
        if name not in fields:
            raise ArtifactError(f"manifest field {prefix}{name} is unknown: {AGAIN}")
    return kind(**{name: _decode(fields[name], value[name], prefix + name) for name in fields})


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type `kind`; `where` is the field's path, for the message."""
    if dataclasses.is_dataclass(kind):
        return record_of(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number = _decode(args[0], value, where)
        if number < args[1]:
            raise wrong_field(where, f"at least {args[1]}", value)
        return number
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise wrong_field(where, "one of " + ", ".join(args), value)
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong_field(where, "a list", value)
        return tuple(_decode(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong_field(where, "an object", value)
        return {name: _decode(args[1], item, f"{where}.{name}") for name, item in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is int and (type(value) is not int or abs(value) >= 2**63):
        raise wrong_field(where, "a 64-bit integer", value)
    if kind is float:
        if type(value) is int:
            return float(_scalar(int, value, where))
        if not isinstance(value, float) or not math.isfinite(value):
            raise wrong_field(where, "a finite number", value)
        return value
    if not isinstance(value, kind):
        raise wrong_field(where, {str: "a string", bool: "true or false"}.get(kind, "an integer"), value)
    return value


def wrong_field(where: str, wanted: str, value: Any) -> ArtifactError:
    """Make the error for a field that is not what is wanted; `where` is its path, "" for the whole manifest."""
    return ArtifactError(f"manifest field {where or '(all)'} must be {wanted}, is {show(value)}: {AGAIN}")
