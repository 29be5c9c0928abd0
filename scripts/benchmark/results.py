"""The JSON of a model in a precision: written after every workload, so that an interrupted run keeps what it has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import figures
from .workloads import all_workloads

FORMAT = 1
IDENTITY = ("format", "model", "precision", "seed", "sizes", "machine")


class Results:
    """One JSON file. Keeps what an earlier run left there if it measured the same thing on the same machine."""

    def __init__(self, path: Path, header: dict[str, Any], run: dict[str, Any]):
        self.path = path
        self.run = run
        new = {"format": FORMAT, **header, "limits": None, "runs": [], "contenders": {}, "absent": {}, "workloads": []}
        old = read(path)
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
        self.write()

    def write(self) -> None:
        """Write the file, with a summary."""
        self.data["summary"] = figures.summary(self.data)
        write_json(self.path, self.data, indent=1)

    def _place(self, name: str) -> int:
        return self._order.index(name) if name in self._order else len(self._order)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of the identity is different, the machine's fields by name."""
    found = [key for key in IDENTITY if key != "machine" and old.get(key) != new[key]]
    before = old.get("machine", {})
    return found + [f"machine ({key})" for key, value in new["machine"].items() if before.get(key) != value]


def write_json(path: Path, data: dict[str, Any], indent: int | None = None) -> None:
    """Write beside and rename: a reader never sees half a file. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(data, indent=indent) + "\n")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any] | None:
    """The results in a file; None if there is none, or it is of another kind."""
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return data if isinstance(data, dict) and data.get("format") == FORMAT else None
