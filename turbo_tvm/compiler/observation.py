"""What one can see of a compile: the module after every pass, and how long each took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.ir.instrument import DumpIR, PassTimingInstrument

from turbo_tvm import config


@contextmanager
def observed(phase: str) -> Iterator[None]:
    """Dump the module after every pass that runs inside, and time them, where `config` says so.

    phase: the folder of the dumps, and the head of the times, which are printed.
    """
    directory, timed = config.dump_ir_directory(), config.times_passes()
    instruments: list[Any] = [] if directory is None else [DumpIR(directory / phase)]
    instruments += [PassTimingInstrument()] if timed else []
    with tvm.transform.PassContext(instruments=instruments):
        yield
        if timed:
            print(f"== passes: {phase}\n{PassTimingInstrument.render()}")
