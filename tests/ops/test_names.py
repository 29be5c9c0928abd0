"""Names of kernels: they say everything that the code depends on, and people can read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from operator_variants import VARIANTS, attention, embedding, in_graph, linear, merged, rows, short

from turbo_tvm.ops import VOCABULARY
from turbo_tvm.ops.formats import BF16
from turbo_tvm.ops.operand import Operand

IDS = [variant.kernel_name() for variant in VARIANTS]


def test_every_operator_has_variants():
    assert {type(variant) for variant in VARIANTS} == set(VOCABULARY)


def test_every_parameter_shows_in_the_name():
    assert len(set(IDS)) == len(IDS)
    assert all(name.isidentifier() for name in IDS)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_a_graph_changes_neither_the_name_nor_the_kernel(variant):
    found = in_graph(variant)
    assert found.kernel_name() == variant.kernel_name()
    assert found.without_graph() == variant == variant.without_graph()


def test_a_kernel_takes_tables_of_any_number_of_rows():
    found = embedding(16, 2)
    tables = tuple(Operand((rows, 16), table.dtype) for rows, table in zip((50, 3), found.tables, strict=True))
    assert in_graph(replace(found, tables=tables)).without_graph() == found


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (linear(768, 3072, activation="gelu"), "linear_768x3072_gelu"),
        (attention(), "attention_2x8_merged_max24"),
        (linear(16, 8, norm_eps=1e-12, residual=True), "linear_16x8_norm_eps1e_12_residual"),
        (linear(16, 8, x=short(16), out=short(8)), "linear_16x8_bf16"),
        (linear(16, 8, x=short(16)), "linear_16x8_bf16_out_fp32"),
        (
            linear(16, 8, x=short(48), residual=rows(40), out=short(40)),
            "linear_16x8_residual_from48_plus40_to40_bf16_extra_fp32",
        ),
        (embedding(16, 2, table_type=BF16.storage), "embedding_16_tables2_bf16_out_fp32"),
        (attention(columns=merged(16, 80), out=rows(24)), "attention_2x8_merged_in80_max24_to24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_are_readable(operator, name):
    assert operator.kernel_name() == name
