"""`gpu`: builds CUDA kernels, runs them in the SIMT executor, and counts what they do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import simt
from cuda_kernels import Gpu


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    with simt.device() as device:
        yield Gpu(device)
