"""A square of vectors, transposed in registers."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu.transpose import transpose_macro


def kernel_of(lanes: int, dtype: str):
    transpose, in_second = transpose_macro(lanes), lanes.bit_length() % 2 == 0

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((lanes, lanes), dtype), out: T.Buffer((lanes, lanes), dtype)):
        with T.sblock("square"):
            T.reads()
            T.writes()
            a = T.sblock_alloc_buffer((lanes, lanes), dtype, scope="local")
            b = T.sblock_alloc_buffer((lanes, lanes), dtype, scope="local")
            for i in T.unroll(lanes):
                for j in T.vectorized(lanes):
                    a[i, j] = x[i, j]
            transpose(a, b)
            done = T.meta_var(b if in_second else a)
            for i in T.unroll(lanes):
                for j in T.vectorized(lanes):
                    out[i, j] = done[i, j]

    return kernel


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_a_square_is_transposed(run_kernel, host_target, lanes, dtype):
    x = np.arange(lanes * lanes).reshape(lanes, lanes).astype(dtype)
    np.testing.assert_array_equal(run_kernel(kernel_of(lanes, dtype), [x], x.shape, host_target, dtype), x.T)
