"""How rows may be spread over threads."""

from __future__ import annotations

import pytest
from cuda_kernels import LENGTHS

from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cuda.reduction import chosen_form, row_form, row_space


@pytest.mark.parametrize("registers", [16, 72])
@pytest.mark.parametrize("n", [*LENGTHS, 70_001])
def test_the_space_of_rows(n, registers):
    vector = next(v for v in (8, 4, 2, 1) if n % v == 0)
    space = row_space(n, vector, registers=registers)
    assert space.default in list(space.settings())
    assert chosen_form(n, vector, (), registers=registers) == row_form(n, vector, registers=registers)
    for setting in space.settings():
        form = chosen_form(n, vector, (Variant(tuple(setting.items())),), registers=registers)
        assert (form.rows, form.threads) == (setting["rows"], setting["threads"])
        assert form.rows * form.strip <= 72
        assert form.segments == 1 or setting == space.default
        assert (form.threads - 1) * vector < 2 * n, "threads with nothing to do"


def test_too_many_elements_for_registers():
    with pytest.raises(ValueError, match="does not fit this kernel"):
        chosen_form(1024, 4, (Variant((("rows", 4), ("threads", 32))),))
