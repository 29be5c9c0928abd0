"""Occupancy, against figures worked out by hand from NVIDIA's rules."""

from __future__ import annotations

import pytest

from turbo_tvm.artifact.manifest import DeviceKernelSpec
from turbo_tvm.profiling.occupancy import occupancy


def kernel(architecture="sm_80", threads=128, registers=32, static=0, dynamic=0):
    return DeviceKernelSpec("k", architecture, registers, 0, static, dynamic, threads)


@pytest.mark.parametrize(
    ("spec", "blocks", "share", "limit"),
    [
        (kernel(), 16, 1.0, "warps"),
        (kernel(threads=32), 32, 0.5, "blocks"),
        (kernel(registers=64), 8, 0.5, "registers"),  # 65536 / 64 / 32 = 32 warps
        (kernel(registers=65), 7, 7 * 4 / 64, "registers"),  # rounded up to 72 registers: 7 warps of each scheduler
        (kernel(registers=255), 2, 2 * 4 / 64, "registers"),
        (kernel(static=36864), 4, 0.25, "shared memory"),  # 164 KiB over 36 KiB and 1 that the system takes
        (kernel(static=20000, dynamic=16864), 4, 0.25, "shared memory"),
        (kernel("sm_75", registers=32, static=36864), 1, 4 / 32, "shared memory"),
        (kernel("sm_75"), 8, 1.0, "warps"),
        (kernel("sm_86"), 12, 1.0, "warps"),
        (kernel("sm_90", static=46080), 4, 0.25, "shared memory"),
        (kernel(threads=1024, registers=64), 1, 0.5, "registers"),
    ],
)
def test_rules(spec, blocks, share, limit):
    found = occupancy(spec)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == pytest.approx(share)


def test_an_architecture_that_is_not_known():
    assert occupancy(kernel("sm_999")) is None
