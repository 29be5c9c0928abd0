"""The executor's memory: alignment, reuse, growth."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.runtime.buffers import ALIGNMENT, KEPT_SHAPES, Buffers, Input, aligned_empty
from turbo_tvm.runtime.manifest import BufferSpec

SPECS = (
    BufferSpec("a", 0, "token", 768),
    BufferSpec("b", 1, "token", 3072),
    BufferSpec("c", 1, "token", 36),
    BufferSpec("d", 2, "sequence", 2),
    BufferSpec("e", 3, "token", 0),
)


def test_buffers_have_the_shapes_that_kernels_bind():
    shapes = [tuple(t.shape) for t in Buffers(SPECS, 12).tensors(5, 2)]
    assert shapes == [(5, 12, 768), (5, 12, 3072), (5, 12, 36), (2, 12, 2), (5, 12)]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096])
def test_memory_is_aligned(size):
    block = aligned_empty(size)
    assert block.nbytes == size and block.ctypes.data % ALIGNMENT == 0


def test_buffers_of_one_slot_share_memory_and_others_do_not():
    views = [np.from_dlpack(t) for t in Buffers(SPECS, 12).tensors(5, 2)]
    assert np.shares_memory(views[1], views[2])
    distinct = [views[0], views[1], views[3], views[4]]
    for i, left in enumerate(distinct):
        for right in distinct[i + 1 :]:
            assert not np.shares_memory(left, right)


def test_the_same_shape_gives_the_same_tensors_again():
    buffers = Buffers(SPECS, 12)
    first = buffers.tensors(5, 2)
    assert buffers.tensors(5, 2) is first


def test_a_smaller_batch_allocates_nothing_and_a_larger_one_grows():
    buffers = Buffers(SPECS, 12)
    buffers.tensors(8, 1)
    held = buffers.bytes_held
    buffers.tensors(3, 1)
    assert buffers.bytes_held == held
    buffers.tensors(9, 1)
    assert buffers.bytes_held > held


def test_views_of_replaced_memory_are_not_handed_out_again():
    buffers = Buffers(SPECS, 12)
    buffers.tensors(2, 1)
    buffers.tensors(50, 1)
    small, large = (np.from_dlpack(buffers.tensors(n, 1)[0]) for n in (2, 50))
    assert np.shares_memory(small, large)


def test_views_of_many_shapes_do_not_pile_up():
    buffers = Buffers(SPECS, 12)
    for tiles in range(1, 200):
        buffers.tensors(tiles, 1)
    assert len(buffers._views) <= 64


def test_an_input_is_filled_in_place_and_keeps_its_tensors():
    memory = Input("int32")
    large = memory.tensor(np.full((5, 12), 7))
    small = memory.tensor(np.arange(24).reshape(2, 12))
    assert small.data_ptr() == large.data_ptr() and small.data_ptr() % ALIGNMENT == 0
    np.testing.assert_array_equal(np.from_dlpack(small), np.arange(24).reshape(2, 12))
    assert memory.tensor(np.zeros((5, 12))).same_as(large) and str(large.dtype) == "int32"
    assert not np.from_dlpack(large).any()


def test_an_input_grows_and_forgets_its_old_memory():
    memory = Input("int64")
    old = memory.tensor(np.ones((1, 3), np.int64))
    memory.tensor(np.ones((50, 3), np.int64))
    assert memory.tensor(np.zeros((1, 3), np.int64)).data_ptr() != old.data_ptr()
    assert np.from_dlpack(old).all()


def test_inputs_of_many_shapes_do_not_pile_up():
    memory = Input("int32")
    for length in [*range(1, 200), *range(200, 1, -1)]:
        assert tuple(memory.tensor(np.zeros(length, np.int32)).shape) == (length,)
    assert len(memory._views) <= KEPT_SHAPES
