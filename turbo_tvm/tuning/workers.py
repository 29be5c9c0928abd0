"""Processes that build and measure candidates; one that crashes or hangs costs a trial and is restarted.

TVM's `PopenWorker` does the work: functions go there by cloudpickle, and a time-out kills the process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tvm.support.popen_pool import PopenWorker

from turbo_tvm.errors import TuningError


class Workers:
    """A number of processes. A job's result is what its function returns, or a TuningError if it failed."""

    def __init__(self, count: int, timeout_s: float):
        self._timeout_s = timeout_s
        self._workers = [PopenWorker(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.kill()

    def run(self, function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
        """Call `function` with the arguments of every job, several at a time; return the results in order."""
        results: list[Any] = []
        for start in range(0, len(jobs), len(self._workers)):
            group = list(zip(self._workers, jobs[start : start + len(self._workers)], strict=False))
            for worker, job in group:
                worker.send(function, job, timeout=self._timeout_s)
            results += [self._result(worker) for worker, _ in group]
        return results

    def restart(self) -> None:
        """Restart the processes, which drops their state."""
        for worker in self._workers:
            worker.kill()

    def _result(self, worker: PopenWorker) -> Any:
        try:
            return worker.recv()
        except TimeoutError:
            return TuningError(f"took longer than {self._timeout_s:g} s")
        except ChildProcessError:
            return TuningError("the process crashed")
        except TuningError as error:
            return error
        except Exception as error:  # TVM raises many types
            lines = str(error).strip().splitlines() or [""]
            return TuningError(f"{type(error).__name__}: {lines[-1][:300]}")
