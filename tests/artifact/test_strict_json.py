"""Plain JSON values to records: every supported annotation, and what each refuses."""

# No `from __future__ import annotations`: the decoder reads types, and not their names.

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from turbo_tvm.artifact.strict_json import record_of, show
from turbo_tvm.errors import ArtifactError


@dataclass(frozen=True)
class Inner:
    x: Annotated[int, 1]


@dataclass(frozen=True)
class Record:
    count: int
    rate: float
    name: str
    on: bool
    kind: Literal["b", "c"]
    maybe: int | None
    pair: tuple[int, ...]
    table: dict[str, Inner]
    inner: Inner


GOOD = {
    "count": 3,
    "rate": 1,
    "name": "a",
    "on": True,
    "kind": "b",
    "maybe": None,
    "pair": [1, 2],
    "table": {"k": {"x": 1}},
    "inner": {"x": 2},
}


def test_every_annotation():
    made = record_of(Record, GOOD, "")
    assert made == Record(3, 1.0, "a", True, "b", None, (1, 2), {"k": Inner(1)}, Inner(2))
    assert isinstance(made.rate, float)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", True, "field count must be a 64-bit integer, is True"),
        ("count", 2**63, "field count must be a 64-bit integer"),
        ("rate", float("nan"), "field rate must be a finite number"),
        ("rate", "1", "field rate must be a finite number"),
        ("name", 1, "field name must be a string"),
        ("on", 1, "field on must be true or false"),
        ("kind", "d", "field kind must be one of b, c"),
        ("maybe", "1", "field maybe must be a 64-bit integer"),
        ("pair", {"0": 1}, "field pair must be a list"),
        ("pair", [1, None], r"field pair\[1\] must be a 64-bit integer"),
        ("table", [], "field table must be an object"),
        ("table", {"k": {"x": 0}}, r"field table\.k\.x must be at least 1, is 0"),
        ("inner", {}, r"field inner\.x is missing"),
        ("inner", {"x": 1, "y": 1}, r"field inner\.y is unknown"),
        ("inner", 5, "field inner must be an object"),
    ],
)
def test_wrong_values_are_named(field, value, message):
    with pytest.raises(ArtifactError, match=message):
        record_of(Record, GOOD | {field: value}, "")


def test_what_is_no_object():
    with pytest.raises(ArtifactError, match=r"field \(all\) must be an object"):
        record_of(Record, [], "")


def test_long_values_are_cut_short():
    assert len(show("a" * 10_000)) <= 100 and len(show([[[[[[list(range(1000))]]]]]])) < 500
