"""Tensors in this machine's memory and on a GPU, which is the SIMT executor."""

from __future__ import annotations

import gc

import numpy as np
import psutil
import pytest
import simt

from turbo_tvm.runtime.device.devices import KEPT_SHAPES, Gpu, Host, aligned_empty


@pytest.fixture(params=["host", "gpu"])
def device(request):
    if request.param == "host":
        yield Host()
    else:
        with simt.device():
            yield Gpu()


DTYPES = ["float64", "float32", "float16", "int64", "int32", "uint16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_lie_where_they_are_asked_to(device, dtype):
    block = device.allocate(4096)
    first = device.view(block, 0, np.dtype(dtype), (3, 5))
    second = device.view(block, 1024, np.dtype(dtype), (2, 2, 2))
    assert second.data_ptr() - first.data_ptr() == 1024
    assert tuple(first.shape) == (3, 5) and str(first.dtype) == dtype
    values = np.arange(8).reshape(2, 2, 2).astype(dtype)
    second.copyfrom(values)
    np.testing.assert_array_equal(device.download(second), values)
    np.testing.assert_array_equal(device.download(device.view(block, 1024, np.dtype(dtype), (8,))), values.reshape(-1))


def test_arrays_go_there_and_back(device):
    array = aligned_empty(7 * 9 * 4).view(np.float32).reshape(7, 9)
    array[...] = np.random.default_rng(0).normal(size=(7, 9))
    np.testing.assert_array_equal(device.download(device.upload(array)), array)


def test_inputs_are_filled_in_place(device):
    memory = device.input("int32")
    large = memory.tensor(np.full((5, 12), 7))
    small = memory.tensor(np.arange(24).reshape(2, 12))
    assert small.data_ptr() == large.data_ptr()
    np.testing.assert_array_equal(device.download(small), np.arange(24).reshape(2, 12))
    for n in range(1, 3 * KEPT_SHAPES):
        assert tuple(memory.tensor(np.zeros(n, np.int64)).shape) == (n,)


def test_headers_are_freed_with_their_tensors():
    """Some twelve million bytes, if they were kept."""
    with simt.device():
        gpu = Gpu()
        block = gpu.allocate(64)
        before = 0
        for i in range(110_000):
            gpu.view(block, 0, np.dtype("float32"), (2, 2))
            if i == 10_000:
                gc.collect()
                before = psutil.Process().memory_info().rss
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 6e6


def test_memory_that_a_gpu_does_not_have(monkeypatch):
    import tvm

    def refuse(*_arguments):
        raise RuntimeError("out of memory")

    with simt.device():
        monkeypatch.setattr(tvm.runtime, "empty", refuse)
        with pytest.raises(MemoryError, match="cannot give 4,096 bytes: out of memory"):
            Gpu().allocate(4096)
