"""Activations: every name has its arithmetic, and operators mean one of them."""

from __future__ import annotations

import pytest

from turbo_tvm.ops.activations import ACTIVATIONS, activation_of
from turbo_tvm.schedules.common import vector_math


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_a_function_of_that_name(name):
    assert vector_math.activation(name) is getattr(vector_math, name)


@pytest.mark.parametrize(("name", "operator"), [pair for pair in ACTIVATIONS.items() if pair[1] is not None])
def test_an_operator_means_one_activation(name, operator):
    assert activation_of(operator) == name
    assert list(ACTIVATIONS.values()).count(operator) == 1


@pytest.mark.parametrize("operator", ["add", "", "relax.nn.gelu", "quick_gelu"])
def test_other_operators_are_none(operator):
    assert activation_of(operator) is None
