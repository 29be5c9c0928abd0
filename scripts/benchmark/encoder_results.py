"""The results of a model in a precision: kept after every workload, so that an interrupted run loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import pages, report
from .results import raw_path, read_json
from .workloads import all_workloads

FORMAT = 1
IDENTITY = ("format", "model", "precision", "seed", "sizes", "machine")


class Results:
    """Raw samples and their summary. Keeps what an earlier run left if it measured the same on the same machine."""

    def __init__(self, path: Path, header: dict[str, Any], run: dict[str, Any]):
        self.path = path
        self.run = run
        new = {"format": FORMAT, **header, "limits": None, "runs": [], "contenders": {}, "absent": {}, "workloads": []}
        old = read_raw(path)
        self.differences = [] if old is None else _differences(old, new)
        self.data = new if old is None or self.differences else old
        self._order = [w.name for w in all_workloads(header["seed"])]

    def has(self, workload: str) -> bool:
        """Whether the workload is measured."""
        return any(w["name"] == workload for w in self.data["workloads"])

    def contenders(self, details: dict[str, Any], absent: dict[str, str]) -> None:
        """Who took part in this run; written with its first workload."""
        self.data["contenders"] |= details
        present = {name: why for name, why in self.data["absent"].items() if name not in details}
        self.data["absent"] = present | {n: why for n, why in absent.items() if n not in self.data["contenders"]}

    def add(self, workload: dict[str, Any]) -> None:
        """Put in a workload, in place of an earlier measurement of it, and write."""
        others = [w for w in self.data["workloads"] if w["name"] != workload["name"]]
        self.data["workloads"] = sorted([*others, workload], key=lambda w: self._place(w["name"]))
        if self.run not in self.data["runs"]:
            self.data["runs"].append(self.run)
        pages.keep(report.PAGE, self.data, self.path)

    def _place(self, name: str) -> int:
        return self._order.index(name) if name in self._order else len(self._order)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of the identity is different, the machine's fields by name."""
    found = [key for key in IDENTITY if key != "machine" and old.get(key) != new[key]]
    before = old.get("machine", {})
    return found + [f"machine ({key})" for key, value in new["machine"].items() if before.get(key) != value]


def read_raw(path: Path) -> dict[str, Any] | None:
    """Return the raw samples beside a summary; None if there are none, or they are of another kind."""
    data = read_json(raw_path(path))
    return data if data is not None and data.get("format") == FORMAT else None
