"""Shrink tuning logs for shipping: of every trial what it gained, not its samples.

Compiling reads task and result lines only, and these stay as they are, byte by byte. A trial keeps its setting, search,
seed, error and time, and machine and threads where these are not the ones that the file's result names. Of each
bucket's pairs of seconds one is left: the default's median, and the time at which a candidate would gain over that
median what `candidate.gains` says of all pairs. So a search that goes on, `tune --report` and `tune --plot` see the
same gains as before.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from turbo_tvm.compiler.tuning_log import LOCK, ResultRecord, TrialRecord, decode, encode, read_records
from turbo_tvm.tuning.candidate import gains

DEFAULT_DIGITS, CANDIDATE_DIGITS = 4, 5  # significant ones; a measured time has four, so a gain stays to 1e-4


def compact(directory: Path) -> dict[Path, int]:
    """Compact every log below a directory; return the bytes saved, by log. TuningLogError for a damaged one."""
    saved: dict[Path, int] = {}
    for path in sorted(directory.rglob("*.jsonl")):
        list(read_records(path))  # names the first damaged line before anything changes
        with FileLock(path.parent / LOCK):
            before = path.read_bytes()
            after = b"".join(compacted_lines(before.splitlines(keepends=True)))
            if after != before:
                written = path.with_name(path.name + ".new")
                written.write_bytes(after)
                written.replace(path)
                saved[path] = len(before) - len(after)
    return saved


def compacted_lines(lines: Sequence[bytes]) -> list[bytes]:
    """Return the lines of a log, those of trials shorter."""
    records = [decode(line.removesuffix(b"\n")) for line in lines]
    results = [record for record in records if isinstance(record, ResultRecord)]
    last = results[-1] if results else None
    return [
        encode(compacted(record, last)) if isinstance(record, TrialRecord) else line
        for record, line in zip(records, lines, strict=True)
    ]


def compacted(trial: TrialRecord, result: ResultRecord | None = None) -> TrialRecord:
    """Return a trial with one pair of seconds per bucket, and without what the result says of its machine."""
    made = replace(trial, seconds={rows: _one_pair(pairs) for rows, pairs in trial.seconds.items()})
    if result is None or (trial.machine, trial.threads) != (result.machine, result.threads):
        return made
    return replace(made, machine="", threads=0)


def _one_pair(pairs: Sequence[Sequence[float]]) -> list[list[float]]:
    """One pair that gains what all of them gain. A single pair stays, so that compacting twice changes nothing."""
    if len(pairs) < 2:
        return [list(pair) for pair in pairs]
    default = _rounded(statistics.median(a for a, _ in pairs), DEFAULT_DIGITS)
    return [[default, _rounded(default / gains({0: pairs})[0], CANDIDATE_DIGITS)]]


def _rounded(seconds: float, digits: int) -> float:
    return float(f"{seconds:.{digits}g}")
