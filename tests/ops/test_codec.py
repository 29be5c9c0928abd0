"""Operators as plain data: what is written is read again, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_operators import SAMPLES

from turbo_tvm.ops import VOCABULARY, Attention, Gate, Linear, Operator
from turbo_tvm.ops.codec import from_plain, to_plain
from turbo_tvm.ops.operand import Operand

DIMENSIONS = st.none() | st.integers(1, 2**40)
OPERANDS = st.builds(
    lambda shape, dtype: Operand(tuple(shape), dtype),
    st.lists(DIMENSIONS, max_size=4),
    st.sampled_from(["float32", "uint16", "int32", "float16", "int64"]),
)
PLAIN_VALUES = {
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(),
    bool: st.booleans(),
    type(None): st.none(),
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def values(hint: Any) -> st.SearchStrategy:
    """Values of an annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[1:] == (...,):
        return st.lists(values(arguments[0]), max_size=4).map(tuple)
    return st.tuples(*map(values, arguments)) if origin is tuple else PLAIN_VALUES[hint]


def field_values(field: dataclasses.Field, hint: Any) -> st.SearchStrategy:
    if field.name != "out" and "role" not in field.metadata:
        return values(hint)
    if field.metadata.get("several"):
        return st.lists(OPERANDS, min_size=1, max_size=3).map(tuple)
    optional = field.default is None
    return st.none() | OPERANDS if optional else OPERANDS


def operators(kind: type[Operator]) -> st.SearchStrategy[Operator]:
    """Operators of a kind, as its fields are annotated."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: field_values(f, hints[f.name]) for f in dataclasses.fields(kind)})


OPERATORS = st.sampled_from(VOCABULARY).flatmap(operators)


def through_json(plain: Any) -> Any:
    return json.loads(json.dumps(plain))


@pytest.mark.parametrize("kind", VOCABULARY, ids=lambda kind: kind.NAME)
@given(data=st.data())
def test_what_is_written_is_read_again(kind, data):
    operator = data.draw(operators(kind))
    again = from_plain(through_json(to_plain(operator)))
    assert again == operator and hash(again) == hash(operator)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.kernel_name())
def test_samples_are_read_again(sample):
    assert from_plain(through_json(to_plain(sample))) == sample


ROWS = Operand.rows(8, row_tile=4)
LINEAR = Linear(x=ROWS, weight=Operand((8, 8), "float32"), bias=Operand((8,), "float32"), activation="gelu", out=ROWS)


def test_the_text_of_a_product():
    assert to_plain(LINEAR) == {
        "operator": "linear",
        "x": [[None, 4, 8], "float32"],
        "weight": [[8, 8], "float32"],
        "bias": [[8], "float32"],
        "activation": "gelu",
        "out": [[None, 4, 8], "float32"],
    }


def test_attributes_that_are_as_by_default_need_not_be_written():
    gate = Gate(x=ROWS, activation="silu", columns=4, out=ROWS)
    assert "second" not in to_plain(gate)
    assert from_plain(to_plain(gate) | {"second": False}) == gate


ATTENTION = next(sample for sample in SAMPLES if isinstance(sample, Attention))


def changed(operator: Operator, /, **fields: Any) -> dict[str, Any]:
    return through_json(to_plain(operator)) | fields


@pytest.mark.parametrize("plain", [None, [], "linear", 1, {}, {"operator": None}, {"operator": ["linear"]}])
def test_what_names_no_operator_is_refused(plain):
    with pytest.raises(ValueError, match="no operator"):
        from_plain(plain)


@pytest.mark.parametrize("name", ["", "Linear", "turbo.linear", "__init__"])
def test_an_unknown_operator_is_refused(name):
    with pytest.raises(ValueError, match="there is no operator"):
        from_plain(changed(LINEAR, operator=name))


@pytest.mark.parametrize("name", ["eps", "residuals", "NAME", "kernel_name", "__class__", ""])
def test_an_unknown_field_is_refused(name):
    with pytest.raises(ValueError, match="linear has no field"):
        from_plain(changed(LINEAR, **{name: 1}))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.kernel_name())
def test_a_missing_field_is_refused(sample):
    plain = to_plain(sample)
    optional = {f.name for f in dataclasses.fields(sample) if f.default is not dataclasses.MISSING}
    for name in plain.keys() - optional - {"operator"}:
        with pytest.raises(ValueError, match=name):
            from_plain({key: value for key, value in plain.items() if key != name})


@pytest.mark.parametrize("name", ["ids", "tables"])
def test_an_embedding_of_nothing_is_refused(name):
    embedding = next(plain for plain in map(to_plain, SAMPLES) if plain["operator"] == "embedding")
    with pytest.raises(ValueError, match=name):
        from_plain({key: value for key, value in embedding.items() if key != name})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", True),
        ("heads", 2.0),
        ("heads", "2"),
        ("heads", None),
        ("scale", 1),
        ("scale", True),
        ("scale", "0.5"),
        ("window", False),
        ("window", 0.5),
        ("first_columns", [0, 0]),
        ("first_columns", [0, 0, 0, 0]),
        ("first_columns", [0, 0, True]),
        ("first_columns", [0, [0], 0]),
        ("first_columns", "000"),
        ("first_columns", {"0": 0}),
        ("first_columns", 0),
    ],
)
def test_an_attribute_of_another_type_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} cannot be"):
        from_plain(changed(ATTENTION, **{field: value}))


def test_a_word_that_is_not_among_those_allowed_is_refused():
    pool = next(plain for plain in map(to_plain, SAMPLES) if plain["operator"] == "pool")
    for mode in ("max", "", None, 0, ["mean"]):
        with pytest.raises(ValueError, match="mode cannot be"):
            from_plain(pool | {"mode": mode})


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        True,
        "float32",
        [],
        [[8]],
        [[8], "float32", 1],
        [8, "float32"],
        ["8", "float32"],
        [[8], 32],
        [[8], None],
        [[0], "float32"],
        [[-8], "float32"],
        [[8.0], "float32"],
        [[True], "float32"],
        [["8"], "float32"],
        [[[8]], "float32"],
        {"shape": [8], "dtype": "float32"},
    ],
)
@pytest.mark.parametrize("field", ["x", "residual", "out"])
def test_what_is_no_tensor_is_refused(field, tensor):
    with pytest.raises(ValueError, match=f"{field} is no tensor"):
        from_plain(changed(LINEAR, **{field: tensor}))


@pytest.mark.parametrize("tensors", [None, {}, "ids", 1])
def test_several_tensors_are_a_list(tensors):
    embedding = next(plain for plain in map(to_plain, SAMPLES) if plain["operator"] == "embedding")
    with pytest.raises(ValueError, match="ids is a list of tensors"):
        from_plain(embedding | {"ids": tensors})
    with pytest.raises(ValueError, match="ids is no tensor"):
        from_plain(embedding | {"ids": [[[8], "float32"], tensors]})


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("field", ["x", "residual", "first", "activation", "columns", "norm_eps", "out"])
@pytest.mark.parametrize("depth", [10, 900, 20_000])
def test_deep_lists_are_refused(field, depth):
    with pytest.raises(ValueError, match=field):
        from_plain(changed(LINEAR, **{field: nested(depth)}))


@pytest.mark.parametrize("depth", [10, 900, 20_000])
def test_deep_lists_in_tuples_are_refused(depth):
    with pytest.raises(ValueError, match="first_columns"):
        from_plain(changed(ATTENTION, first_columns=nested(depth)))
    with pytest.raises(ValueError, match="first_columns"):
        from_plain(changed(ATTENTION, first_columns=[0, 0, nested(depth)]))


def test_a_message_about_a_large_value_is_short():
    with pytest.raises(ValueError) as error:
        from_plain(changed(LINEAR, columns=["x" * 1000] * 1000))
    assert len(str(error.value)) < 500


def accepted(plain: Any) -> Operator | None:
    """The operator that plain data is taken for; None if it is refused."""
    try:
        return from_plain(plain)
    except ValueError:
        return None


@given(JSON)
def test_arbitrary_data_is_refused(plain):
    assert accepted(plain) is None


@given(st.data())
def test_a_changed_field_is_refused_or_read_as_it_stands(data):
    plain = through_json(to_plain(data.draw(OPERATORS)))
    name = data.draw(st.sampled_from(sorted(plain.keys() - {"operator"})) | st.text())
    plain[name] = data.draw(JSON)
    found = accepted(plain)
    if found is not None:
        written = to_plain(found)
        assert json.dumps(written.get(name, plain[name])) == json.dumps(plain[name])  # as text, where 1 is not true
        assert from_plain(through_json(written)) == found
