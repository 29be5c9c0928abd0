"""Our passes as TVM's: functions of a module become module passes, which TVM runs in sequence, times and dumps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import tvm
from tvm import ir

Pass = Callable[[ir.IRModule], ir.IRModule]  # one of TVM's, which are called like this
Report = TypeVar("Report")


def step(run: Callable[..., ir.IRModule], *arguments: Any, **options: Any) -> Pass:
    """Return the module pass that calls `run(mod, *arguments, **options)`, under the name of `run`.

    What it calls of TVM in turn is not dumped or timed by itself.
    """

    @tvm.transform.module_pass(opt_level=0, name=run.__name__)
    def module_pass(mod: ir.IRModule, _context: Any) -> ir.IRModule:
        with tvm.transform.PassContext():
            return run(mod, *arguments, **options)

    return module_pass


class Reporting(Generic[Report]):
    """A pass that also finds something out: `step` is the module pass, `report` what it found when it last ran."""

    report: Report

    def __init__(self, run: Callable[..., tuple[ir.IRModule, Report]], *arguments: Any, **options: Any):
        def reported(mod: ir.IRModule) -> ir.IRModule:
            mod, self.report = run(mod, *arguments, **options)
            return mod

        reported.__name__ = run.__name__
        self.step = step(reported)
