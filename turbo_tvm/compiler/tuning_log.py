"""Tuning logs: a file of JSON lines per kernel, in a directory per target, that several tuners may write at once.

    {"kind": "task", ...}    which kernel, target and versions; what follows belongs to it
    {"kind": "trial", ...}   a setting, and the samples of it and of the default beside it (one pair of them once the
                             log was compacted: turbo_tvm/tuning/compact.py); or why it failed
    {"kind": "result", ...}  the variants chosen of these trials; the last one counts

A line ends with a checksum of itself. It is appended in one piece while the directory is locked, so that a process
which dies leaves whole lines, and at worst a last one in part; a reader waits for one that is being written, says which
line is damaged, and changes nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from turbo_tvm.errors import TuningLogError
from turbo_tvm.schedules.common.space import Variant

FORMAT = 1
LOCK = ".lock"


@dataclass(frozen=True)
class TaskRecord:
    """What was measured: the kernel's recipe and version, for which CPU or GPU, by which TVM."""

    kernel: str
    recipe: str
    kernel_version: int
    target: str
    tvm: str
    format: int = FORMAT

    def differences(self, other: TaskRecord) -> list[str]:
        """In words, what keeps measurements of `other` from holding for this."""
        words = {"format": "log format", "tvm": "TVM", "kernel_version": "kernel version", "target": "target"}
        found = [
            f"{word} {getattr(other, name)!r} instead of {getattr(self, name)!r}"
            for name, word in words.items()
            if getattr(self, name) != getattr(other, name)
        ]
        return found or (["another kernel of that name"] if self.recipe != other.recipe else [])


@dataclass(frozen=True)
class TrialRecord:
    """One setting. seconds: by the rows of the bucket, pairs of (default, candidate) as they were timed in turn.

    error: why there are none.
    """

    setting: dict[str, int]
    search: str
    seed: int
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    error: str = ""
    machine: str = ""
    threads: int = 0
    time: str = ""


@dataclass(frozen=True)
class ResultRecord:
    """variants: (setting, max_rows or None) in order. gains: of them over the default, timed again after the trials.
    finals: what every setting gained that was timed again, {"setting", "gains"}, whether it was chosen or not.
    """

    variants: list[dict[str, Any]]
    gains: dict[str, float]
    seconds: dict[str, list[list[float]]]
    lengths: dict[str, list[int]]
    weights: dict[str, float]
    trials: int
    search: str
    seed: int
    machine: str = ""
    threads: int = 0
    time: str = ""
    finals: list[dict[str, Any]] = field(default_factory=list)

    def as_variants(self) -> tuple[Variant, ...]:
        """What the compiler builds; none where the default was best."""
        made = tuple(Variant(tuple(sorted(v["setting"].items())), v["max_rows"]) for v in self.variants)
        return made if any(variant.setting for variant in made) else ()


@dataclass(frozen=True)
class KernelLog:
    """What a file says of one task; `task` is None where it says nothing of this one, and `others` what it is about."""

    task: TaskRecord | None
    trials: tuple[TrialRecord, ...] = ()
    results: tuple[ResultRecord, ...] = ()
    others: tuple[TaskRecord, ...] = ()

    @property
    def result(self) -> ResultRecord | None:
        """The latest choice."""
        return self.results[-1] if self.results else None


_KINDS: dict[str, Any] = {"task": TaskRecord, "trial": TrialRecord, "result": ResultRecord}
_TYPES: dict[str, type] = {"str": str, "int": int, "dict": dict, "list": list}
_MEASURED = (b'{"kind":"trial",', b'{"kind":"result",')
Record = TaskRecord | TrialRecord | ResultRecord


class TuningLog:
    """The logs of one target: `directory` / `target`."""

    def __init__(self, directory: Path, target: str):
        self.directory = Path(directory) / target
        self.target = target

    def path(self, kernel: str) -> Path:
        """The kernel's file."""
        return self.directory / f"{kernel}.jsonl"

    def read(self, task: TaskRecord) -> KernelLog:
        """What the kernel's file says of this task. TuningLogError for a damaged one."""
        path = self.path(task.kernel)
        if not path.exists():
            return KernelLog(None)
        current: TaskRecord | None = None
        mine, others = False, []
        trials: list[TrialRecord] = []
        results: list[ResultRecord] = []
        for record in read_records(path):
            if isinstance(record, TaskRecord):
                current = record
                differs = task.differences(record)
                mine = mine or not differs
                others += [record] if differs else []
            elif current is None:
                raise TuningLogError(f"{path} is no tuning log: its first line does not name a task; move it away")
            elif not task.differences(current):
                (trials if isinstance(record, TrialRecord) else results).append(record)  # type: ignore[arg-type]
        return KernelLog(task if mine else None, tuple(trials), tuple(results), tuple(others))

    def append(self, task: TaskRecord, records: Sequence[TrialRecord | ResultRecord]) -> None:
        """Add records of the task. TuningLogError where the file ends in the middle of a line, or cannot be written."""
        path = self.path(task.kernel)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / LOCK), path.open("a+b") as file:
                _check_end(path, file)
                file.write(b"".join(encode(record) for record in self._headed(task, records)))
        except OSError as error:
            raise TuningLogError(f"the tuning log {path} cannot be written: {error.strerror or error}") from error

    def _headed(self, task: TaskRecord, records: Sequence[Record]) -> list[Record]:
        """The records, after their task if the file's latest one is another."""
        path = self.path(task.kernel)
        last = None
        for record in read_records(path):
            last = record if isinstance(record, TaskRecord) else last
        return [*([] if last == task else [task]), *records]


def encode(record: Record) -> bytes:
    """Return the line of a record. A field that is empty, as it is by default, is left out."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    default = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(record)}
    said = {name: value for name, value in asdict(record).items() if value or value != default[name]}
    text = json.dumps({"kind": kind, **said}, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{_crc(text)}"}}\n'.encode()


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file. TuningLogError names the first line that is damaged."""
    try:
        data = _settled(path)
    except OSError as error:
        raise TuningLogError(f"the tuning log {path} cannot be read: {error.strerror or error}") from error
    *lines, rest = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        record = decode(line)
        if record is None:
            raise damaged(path, number, "is damaged or not a tuner's")
        yield record
    if rest:
        raise damaged(path, len(lines) + 1, "was written in part")


def _settled(path: Path) -> bytes:
    """A file as it is while nobody writes it: a line that seems to lack its end may be on its way."""
    data = path.read_bytes()
    if data[-1:] in (b"", b"\n"):
        return data
    try:
        with FileLock(path.parent / LOCK):
            return path.read_bytes()
    except OSError:  # a directory in which nobody can write
        return data


def decode(line: bytes) -> Record | None:
    """The record of a line, None if it is damaged."""
    head, mark, tail = line.rpartition(b',"crc":"')
    try:
        text = head.decode() + "}"
        if not mark or tail.decode() != f'{_crc(text)}"}}':
            return None
        plain = json.loads(text)
        record = _KINDS[plain.pop("kind")](**plain)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if _well_formed(record) else None


def _well_formed(record: Record) -> bool:
    """Whether the fields have their types, as far as readers rely on them."""
    if not all(isinstance(getattr(record, f.name), _TYPES[f.type.partition("[")[0]]) for f in fields(record)):
        return False
    return all(
        isinstance(v, dict)
        and v.keys() == {"setting", "max_rows"}
        and isinstance(v["setting"], dict)
        and isinstance(v["max_rows"], int | None)
        for v in getattr(record, "variants", ())
    )


def damaged(path: Path, number: int, what: str) -> TuningLogError:
    """The error for a line of a log."""
    return TuningLogError(
        f"line {number} of the tuning log {path} {what}: run `turbo-tvm tune --repair --logs {path.parent.parent}`, "
        "which moves such lines to a file beside it, or leave the logs out with --no-logs"
    )


def repair(directory: Path) -> dict[Path, int]:
    """Move the damaged lines of every log below a directory into `<log>.damaged`; how many, by log.

    With one that may have named a task goes what was measured for it: it would count for the task before.
    """
    moved: dict[Path, int] = {}
    for path in sorted(directory.rglob("*.jsonl")):
        with FileLock(path.parent / LOCK):
            lines = [line for line in path.read_bytes().split(b"\n") if line]
            good, bad = _sorted(lines)
            if not bad and path.read_bytes().endswith(b"\n"):
                continue
            if bad:
                with path.with_name(path.name + ".damaged").open("ab") as aside:
                    aside.write(b"".join(line + b"\n" for line in bad))
            written = path.with_name(path.name + ".new")
            written.write_bytes(b"".join(line + b"\n" for line in good))
            written.replace(path)
            moved[path] = len(bad)
    return moved


def _sorted(lines: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Which lines of a log are good, and which are damaged or belong to a task that is."""
    good: list[bytes] = []
    bad: list[bytes] = []
    orphaned = False
    for line in lines:
        record = decode(line)
        if isinstance(record, TaskRecord):
            orphaned = False
        elif record is None:
            orphaned = orphaned or b'"kind":"task"' in line or not line.startswith(_MEASURED)
        (bad if record is None or orphaned else good).append(line)
    return good, bad


def _check_end(path: Path, file: Any) -> None:
    file.seek(0, 2)
    if file.tell():
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.seek(0)
            raise damaged(path, file.read().count(b"\n") + 1, "was written in part")


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
