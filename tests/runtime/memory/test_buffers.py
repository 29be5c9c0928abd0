"""TVM's tensors in the executor's memory: alignment, reuse, growth."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.artifact.manifest import BufferSpec
from turbo_tvm.errors import MemoryBudgetError
from turbo_tvm.runtime.device.devices import KEPT_SHAPES, HostInput, aligned_empty
from turbo_tvm.runtime.memory.buffers import Buffers
from turbo_tvm.runtime.memory.planner import ALIGNMENT

SPECS = (
    BufferSpec("a", ("token_tiles", "12", "768"), "float32", 0, 2),
    BufferSpec("b", ("token_tiles", "12", "3072"), "float32", 1, 2),
    BufferSpec("c", ("token_tiles", "12", "36"), "uint16", 3, 4),
    BufferSpec("d", ("sequence_tiles", "12", "2"), "float32", 3, 4),
    BufferSpec("e", ("token_tiles", "12"), "float32", 3, 4),
)


def batch(tokens: int, sequences: int) -> dict[str, int]:
    return {"token_tiles": tokens, "sequence_tiles": sequences}


def test_buffers_have_the_shapes_that_kernels_bind():
    tensors = Buffers(SPECS).tensors(batch(5, 2))
    assert [tuple(t.shape) for t in tensors] == [(5, 12, 768), (5, 12, 3072), (5, 12, 36), (2, 12, 2), (5, 12)]
    assert [str(t.dtype) for t in tensors] == ["float32", "float32", "uint16", "float32", "float32"]
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in tensors)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096])
def test_memory_is_aligned(size):
    block = aligned_empty(size)
    assert block.nbytes == size and block.ctypes.data % ALIGNMENT == 0


def test_buffers_share_memory_only_if_they_never_live_at_once():
    views = [np.from_dlpack(t) for t in Buffers(SPECS).tensors(batch(5, 2))]
    assert not np.shares_memory(views[0], views[1])
    for i in (2, 3, 4):
        assert np.shares_memory(views[i], views[0]) or np.shares_memory(views[i], views[1])
        for j in range(2, i):
            assert not np.shares_memory(views[i], views[j])


def test_the_same_shape_gives_the_same_tensors_again():
    buffers = Buffers(SPECS)
    first = buffers.tensors(batch(5, 2))
    assert buffers.tensors(batch(5, 2)) is first


def test_a_smaller_batch_allocates_nothing_and_a_larger_one_grows():
    buffers = Buffers(SPECS)
    buffers.tensors(batch(8, 1))
    held = buffers.arena.bytes_held
    buffers.tensors(batch(3, 1))
    assert buffers.arena.bytes_held == held
    buffers.tensors(batch(19, 1))
    assert buffers.arena.bytes_held > held


def test_views_of_replaced_memory_are_not_handed_out_again():
    buffers = Buffers(SPECS)
    buffers.tensors(batch(2, 1))
    buffers.tensors(batch(50, 1))
    (block,) = buffers.arena.blocks
    for tokens in (2, 50):
        assert all(np.shares_memory(np.from_dlpack(t), block) for t in buffers.tensors(batch(tokens, 1)))


def test_views_of_many_shapes_do_not_pile_up():
    buffers = Buffers(SPECS)
    buffers.tensors(batch(200, 1))  # memory that grows drops them as well
    for tiles in range(1, 200):
        buffers.tensors(batch(tiles, 1))
    assert len(buffers._views) <= KEPT_SHAPES


def test_regions_are_the_bytes_of_the_tensors():
    buffers = Buffers(SPECS)
    assert buffers.held_regions() == []
    tensors = buffers.tensors(batch(5, 2))
    for region, tensor in zip(buffers.held_regions(), tensors, strict=True):
        assert region.ctypes.data == tensor.data_ptr()
        assert region.nbytes == np.from_dlpack(tensor).nbytes


def test_a_budget_is_kept():
    buffers = Buffers(SPECS)
    buffers.arena.budget = 1000
    with pytest.raises(MemoryBudgetError):
        buffers.tensors(batch(5, 2))
    assert buffers.arena.bytes_held == 0


def test_an_input_is_filled_in_place_and_keeps_its_tensors():
    memory = HostInput("int32")
    large = memory.tensor(np.full((5, 12), 7))
    small = memory.tensor(np.arange(24).reshape(2, 12))
    assert small.data_ptr() == large.data_ptr() and small.data_ptr() % ALIGNMENT == 0
    np.testing.assert_array_equal(np.from_dlpack(small), np.arange(24).reshape(2, 12))
    assert memory.tensor(np.zeros((5, 12))).same_as(large) and str(large.dtype) == "int32"
    assert not np.from_dlpack(large).any()


def test_an_input_grows_and_forgets_its_old_memory():
    memory = HostInput("int64")
    old = memory.tensor(np.ones((1, 3), np.int64))
    memory.tensor(np.ones((50, 3), np.int64))
    assert memory.tensor(np.zeros((1, 3), np.int64)).data_ptr() != old.data_ptr()
    assert np.from_dlpack(old).all()


def test_inputs_of_many_shapes_do_not_pile_up():
    memory = HostInput("int32")
    for length in [*range(1, 200), *range(200, 1, -1)]:
        assert tuple(memory.tensor(np.zeros(length, np.int32)).shape) == (length,)
    assert len(memory._kept._views) <= KEPT_SHAPES
