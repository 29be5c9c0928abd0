"""What a benchmark leaves: NAME.raw.json with every sample, and NAME.json, the summary that pages and plots need.

The raw file is large and stays on the machine that measured (git ignores it); the summary carries its sha256 and is
committed. Both are written beside their place and renamed, so that a reader never sees half a file.

In a summary's file a list of records is a table, {"columns": [...], "rows": [...]}, in which "seconds.median" stands
for {"seconds": {"median": ...}} and null for a field that a record lacks; `read_summary` makes records of it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIGITS, SPREAD_DIGITS = 6, 4  # significant ones that a summary keeps of a figure, and of quartiles
LINES_DEPTH = 2  # a summary's values have lines of their own down to this depth

Record = dict[str, Any]


def raw_path(path: Path) -> Path:
    """The place of the raw samples of a summary: NAME.raw.json beside NAME.json."""
    return path.with_suffix(".raw.json")


def write_results(path: Path, raw: Record, summarized: Callable[[Record], Record]) -> Record:
    """Write the raw samples and their summary, and return the summary."""
    text = json.dumps(raw) + "\n"
    _replace(raw_path(path), text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    summary = json.loads(json.dumps(rounded(summarized(raw)) | {"raw_sha256": digest}))
    _replace(path, _lines(tabulated(summary)) + "\n")
    return untabulated(summary)


def read_summary(path: Path) -> Record | None:
    """Return the summary in a file; None if there is no such file, or it holds something else."""
    data = read_json(path)
    return None if data is None else untabulated(data)


def read_json(path: Path) -> Record | None:
    """Return the JSON object in a file, or None if there is no such file or it holds something else."""
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return data if isinstance(data, dict) else None


def described(samples: Sequence[float]) -> Record:
    """Return count, median and quartiles of some samples."""
    low, middle, high = np.percentile(samples, (25, 50, 75)).tolist()
    return {"count": len(samples), "median": middle, "quartiles": rounded([low, high], SPREAD_DIGITS)}


def pairwise(numerators: Sequence[float], denominators: Sequence[float]) -> Record:
    """Return count, median and quartiles of the round-by-round ratios of two lists of samples."""
    return described([a / b for a, b in zip(numerators, denominators, strict=True)])


def percentiles(samples: Sequence[float]) -> Record:
    """Return count, mean and the percentiles of latencies that pages show; only a count of 0 where there are none."""
    if not samples:
        return {"count": 0}
    p50, p95, p99 = np.percentile(samples, (50, 95, 99)).tolist()
    return {"count": len(samples), "mean": statistics.fmean(samples), "p50": p50, "p95": p95, "p99": p99}


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of a curve's values, evenly spaced, the last one included."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Return the same structure with floats cut to so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def tabulated(value: Any) -> Any:
    """Return the same structure with tables in place of lists of flat records."""
    if isinstance(value, dict):
        return {key: tabulated(each) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    records = _flattened(value)
    if len(records) < 2 or not all(_is_shallow(record) for record in records):
        return [tabulated(each) for each in value]
    columns = list(dict.fromkeys(key for record in records for key in record))
    return {"columns": columns, "rows": [[record.get(key) for key in columns] for record in records]}


def untabulated(value: Any) -> Any:
    """Return the same structure with records in place of tables; fields that are null are left out of them."""
    if isinstance(value, list):
        return [untabulated(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"columns", "rows"}:
        return [_nested(dict(zip(value["columns"], row, strict=True))) for row in value["rows"]]
    return {key: untabulated(each) for key, each in value.items()}


def _flattened(records: list[Any]) -> list[Record]:
    """Records in which dictionaries that always have the same keys became fields; none if these are no records."""
    if not all(isinstance(record, dict) for record in records):
        return []
    nested = {key for record in records for key, each in record.items() if isinstance(each, dict)}
    same = {key for key in nested if _same_keys([record[key] for record in records if key in record])}
    return [_flat_record(record, same) for record in records]


def _same_keys(values: list[Any]) -> bool:
    return all(isinstance(each, dict) and each and each.keys() == values[0].keys() for each in values)


def _flat_record(record: Record, nested: set[str]) -> Record:
    made: Record = {}
    for key, each in record.items():
        made |= {f"{key}.{inner}": cell for inner, cell in each.items()} if key in nested else {key: each}
    return made


def _nested(cells: Record) -> Record:
    """The record of a table's row."""
    record: Record = {}
    for name, cell in cells.items():
        outer, dot, inner = name.partition(".")
        if cell is not None and dot:
            record.setdefault(outer, {})[inner] = cell
        elif cell is not None:
            record[name] = cell
    return record


def _is_shallow(record: Record) -> bool:
    return all(not isinstance(each, dict | list) or _is_flat(each) for each in record.values())


def _lines(value: Any, depth: int = 0) -> str:
    """JSON with a line per value near the top and compact values below: small, and a diff says what changed."""
    if depth == LINES_DEPTH or not isinstance(value, dict | list) or not value or _is_flat(value):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_lines(each, depth + 1)}" for key, each in value.items()]
    else:
        items = [_lines(each, depth + 1) for each in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{pad}" + f",\n{pad}".join(items) + f"\n{' ' * depth}{end}"


def _is_flat(value: Any) -> bool:
    """Whether a value holds no other dictionaries or lists."""
    inside = value.values() if isinstance(value, dict) else value
    return not any(isinstance(each, dict | list) for each in inside)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(text)
    os.replace(beside, path)
