"""Says at the end of a run how many seconds the tests of each folder took: the suite's weight by kind.

Setting up is included, so the first test that uses a shared model carries its cost. With several workers at once,
seconds are of all workers together.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any


def seconds_by_folder(reports: list[Any]) -> list[tuple[str, int, float]]:
    """Return (folder under tests, tests that were called, seconds of all their phases), the heaviest first."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for report in reports:
        folder = _folder(report.nodeid)
        seconds[folder] += report.duration
        tests[folder] += report.when == "call"
    return [(folder, tests[folder], total) for folder, total in seconds.most_common()]


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Print the table where --durations asks for times at all."""
    if not config.getoption("durations"):
        return
    reports = [
        report
        for kind, of_kind in terminalreporter.stats.items()
        if kind in ("", "passed", "failed", "skipped")
        for report in of_kind
        if hasattr(report, "duration")
    ]
    terminalreporter.section("seconds per folder")
    for folder, tests, seconds in seconds_by_folder(reports):
        terminalreporter.write_line(f"{seconds:8.1f}s  {tests:5d} tests  {folder}")


def _folder(nodeid: str) -> str:
    """Return `tests/passes` for any test below it, and `tests` for one at its top."""
    parts = PurePosixPath(nodeid.split("::")[0]).parts
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]
