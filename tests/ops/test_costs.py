"""What a call of a kernel costs: arithmetic per token and per pair, bytes of weights and of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from operator_variants import (
    DISTANCES,
    SHORT,
    attention,
    embedding,
    gate,
    in_graph,
    linear,
    norm,
    normalize,
    pool,
    rotary,
    rows,
    short,
)
from tvm import tirx

from turbo_tvm.ops import Embedding, Operator
from turbo_tvm.ops.operand import Operand


def look_up(table_rows: Sequence[int], *, table_type: str = "float32", **more: Any) -> Embedding:
    """An embedding of 16 columns from tables of so many rows."""
    found = embedding(16, len(table_rows), table_type=table_type, **more)
    return replace(found, tables=tuple(Operand((count, 16), table_type) for count in table_rows))


TURNED = rotary(48, ((0, 4),), dims=8, positions=24)


@pytest.mark.parametrize(
    ("operator", "flops"),
    [
        (look_up((50, 2, 24), norm_eps=1e-12), 3 * 16),
        (linear(16, 48), 2 * 16 * 48),
        (linear(16, 16, norm_eps=1e-12, residual=True), 2 * 16 * 16),
        (linear(16, 32, activation="gelu"), 2 * 16 * 32),
        (linear(32, 16, norm_eps=1e-12, residual=True), 2 * 32 * 16),
        (linear(16, 8, x=short(16)), 2 * 16 * 8),  # whose weight holds pairs
        (linear(16, 8, x=rows(32), out=rows(24)), 2 * 16 * 8),  # wide rows count their true columns
        (norm(16), 8 * 16),
        (norm(16, x=rows(24), out=rows(24)), 8 * 16),
        (gate("gelu"), 12 * 16),
        (TURNED, 3 * 48),
        (normalize(), 0),
        (pool("mean"), 0),
        (attention(), 0),
        (attention(window=5), 2 * 2 * 2 * 8 * 11),  # 5 keys before, 5 behind and the one at the query's place
        (attention(key_table=DISTANCES, query_table=DISTANCES, window=5), 2 * 4 * 2 * 8 * 11),
    ],
    ids=lambda value: value.kernel_name() if isinstance(value, Operator) else "",
)
def test_operations_are_counted_per_token(operator, flops):
    assert operator.flops_per_token() == flops


@pytest.mark.parametrize(
    ("operator", "flops"),
    [
        # q k^T and p v: a multiplication and an addition each, per head and its 8 columns
        (attention(), 2 * 2 * 2 * 8),
        (attention(position_bias=True), 2 * 2 * 2 * 8),
        (attention(kv_heads=1, columns=((16, 0), (8, 0), (8, 0))), 2 * 2 * 2 * 8),
        (attention(key_table=DISTANCES), 2 * 3 * 2 * 8),
        (attention(key_table=DISTANCES, query_table=DISTANCES), 2 * 4 * 2 * 8),
        (attention(window=5), 0),
        (linear(16, 8), 0),
    ],
    ids=lambda value: value.kernel_name() if isinstance(value, Operator) else "",
)
def test_operations_are_counted_per_pair(operator, flops):
    assert operator.flops_per_pair() == flops


@pytest.mark.parametrize(
    ("operator", "size"),
    [
        (linear(16, 48), 4 * (16 * 48 + 48)),
        (linear(16, 8), 4 * (16 * 16 + 16)),  # panels of 16 columns
        (linear(16, 16, x=short(16)), 4 * (8 * 16 + 16)),  # pairs in words of 4 bytes
        (linear(32, 16, norm_eps=1e-12, residual=True), 4 * (32 * 16 + 3 * 16)),
        (look_up((50, 2, 24), norm_eps=1e-12), 4 * (50 + 2 + 24 + 2) * 16),
        (look_up((50,), table_type=SHORT), 2 * 50 * 16),
        (attention(), 0),
        (attention(position_bias=True), 4 * 2 * 47),
        (attention(key_table=DISTANCES), 4 * 2 * 8 * DISTANCES),
        (TURNED, 4 * 24 * 8),
        (norm(16), 4 * 2 * 16),
        (norm(16, rms=True), 4 * 16),
        (pool("mean"), 0),
    ],
    ids=lambda value: value.kernel_name() if isinstance(value, Operator) else "",
)
def test_bytes_of_weights_are_those_of_the_packed_ones(operator, size):
    assert operator.bytes_weights() == size
    assert in_graph(operator).bytes_weights() == size


ONE_ID = 4  # bytes


@pytest.mark.parametrize(
    ("operator", "size"),
    [
        (linear(16, 8), 4 * (16 + 8)),
        (linear(16, 8, residual=True), 4 * (16 + 8 + 8)),
        (linear(16, 8, x=short(16), residual=short(24)), 2 * 16 + 2 * 24 + 4 * 8),
        (linear(16, 8, x=rows(32), out=rows(24)), 4 * (32 + 24)),  # rows as they lie
        (norm(16, residual=True), 4 * 3 * 16),
        (look_up((50, 2, 24)), 3 * ONE_ID + 4 * (3 * 16 + 16)),  # a row of each table
        (TURNED, ONE_ID + 4 * (48 + 48)),
        (gate("gelu"), 4 * (32 + 16)),
        (attention(columns=((16, 0), (16, 0), (24, 8))), 4 * (16 + 16 + 24 + 16)),
    ],
    ids=lambda value: value.kernel_name() if isinstance(value, Operator) else "",
)
def test_bytes_per_token_are_those_of_its_rows(operator, size):
    tokens = tirx.Var("tokens", "int64")
    assert in_graph(operator, tokens).bytes_per_token(tokens) == size


def test_rows_that_an_operator_reads_twice_count_once():
    tokens = tirx.Var("tokens", "int64")
    found = in_graph(attention(), tokens)
    shared = replace(found, q=found.q, k=found.q, v=found.q)
    assert shared.bytes_per_token(tokens) == 4 * (48 + 16)


def test_rows_of_sequences_count_as_nothing():
    tokens = tirx.Var("tokens", "int64")
    assert in_graph(linear(16, 8)).bytes_per_token(tokens) == 0


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (linear(16, 8, x=short(16)), "16 -> 8"),
        (linear(16, 8, out=rows(24)), "16 -> 8"),
        (attention(), "2 heads x 8"),
        (look_up((50, 2, 24)), "3 tables x 16"),
        (norm(16, out=rows(24)), "16"),
        (gate("gelu"), "16"),
        (pool("mean"), "16"),
    ],
    ids=lambda value: value.kernel_name() if isinstance(value, Operator) else "",
)
def test_sizes_are_described(operator, text):
    assert operator.described() == text
