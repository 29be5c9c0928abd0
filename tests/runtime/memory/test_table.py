"""Shapes and sizes of buffers for a batch."""

from __future__ import annotations

import pytest

from turbo_tvm.artifact.manifest import BufferSpec
from turbo_tvm.runtime.memory.planner import Record
from turbo_tvm.runtime.memory.table import MemoryTable

TABLE = MemoryTable(
    (
        BufferSpec("a", ("token_tiles", "4", "96"), "float32", 0, 3),
        BufferSpec("b", ("batch", "12*length", "length"), "uint16", 2, 2),
        BufferSpec("c", ("batch*length",), "int64", 1, 9),
    )
)
SYMBOLS = {"token_tiles": 5, "batch": 2, "length": 7}


def test_lifetimes_and_types():
    assert TABLE.records == (Record(0, 3), Record(2, 2), Record(1, 9))
    assert TABLE.places == (0, 1, 2)
    assert [str(d) for d in TABLE.dtypes] == ["float32", "uint16", "int64"]


def test_dimensions_are_products():
    assert TABLE.shapes(SYMBOLS) == [(5, 4, 96), (2, 84, 7), (14,)]


def test_sizes_are_bytes():
    assert TABLE.sizes(SYMBOLS) == [5 * 4 * 96 * 4, 2 * 84 * 7 * 2, 14 * 8]


def test_a_symbol_without_a_value_is_an_error():
    with pytest.raises(KeyError, match="length"):
        TABLE.sizes({"token_tiles": 5, "batch": 2})


CHAIN = (
    BufferSpec("a", ("token_tiles", "8"), "float32", 0, 3),
    BufferSpec("b", ("token_tiles", "4"), "float32", 1, 3),
    BufferSpec("c", ("token_tiles", "8"), "float32", 3, 5, "a"),
    BufferSpec("d", ("token_tiles", "8"), "float32", 5, 9, "c"),
)


def test_what_may_replace_another_takes_its_place():
    table = MemoryTable(CHAIN)
    assert table.places == (0, 1, 0, 0)
    assert table.records == (Record(0, 9), Record(1, 3))
    assert table.sizes(SYMBOLS) == [5 * 8 * 4, 5 * 4 * 4]
    assert table.shapes(SYMBOLS) == [(5, 8), (5, 4), (5, 8), (5, 8)]


def test_or_has_one_of_its_own():
    table = MemoryTable(CHAIN, in_place=False)
    assert table.places == (0, 1, 2, 3)
    assert table.records == (Record(0, 3), Record(1, 3), Record(3, 5), Record(5, 9))
