"""A page for every target of the tuning logs: where and how they were made, and what each kernel gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from .report import markdown_row


def run(logs: Path, console: Console) -> int:
    """Write `README.md` beside the logs of every target; how many were written."""
    targets = [
        directory for directory in sorted(logs.iterdir()) if directory.is_dir() and any(directory.glob("*.jsonl"))
    ]
    for directory in targets:
        (directory / "README.md").write_text(page(directory))
        console.print(f"{directory / 'README.md'}")
    return len(targets)


def page(directory: Path) -> str:
    """The page of one target, from the logs alone."""
    from turbo_tvm.compiler.tuning_log import ResultRecord, TaskRecord, TrialRecord, read_records

    kernels: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        found: dict[str, Any] = {"trials": []}
        for record in read_records(path):
            if isinstance(record, TaskRecord):
                found = {"task": record, "trials": []}
            elif isinstance(record, TrialRecord):
                found["trials"].append(record)
            elif isinstance(record, ResultRecord):
                found["result"] = record
        kernels[path.stem] = found
    return _text(directory.name, kernels)


def _text(target: str, kernels: dict[str, dict[str, Any]]) -> str:
    results = [found["result"] for found in kernels.values() if "result" in found]
    buckets = sorted({int(rows) for result in results for rows in result.gains})
    searches = sorted({f"--search {t.search} --seed {t.seed}" for k in kernels.values() for t in k["trials"]})
    times = sorted(result.time for result in results)
    lines = [
        f"# {target}",
        "",
        f"- machine: {'; '.join(sorted({result.machine for result in results}))}; "
        f"threads: {', '.join(sorted({str(result.threads) for result in results}))}",
        f"- TVM: {', '.join(sorted({k['task'].tvm for k in kernels.values() if 'task' in k}))}",
        f"- made: {times[0][:10]} to {times[-1][:10]}" if times else "- made: not finished",
        "- by: `turbo-tvm tune MODEL`, for the models in [the README above](../README.md), with "
        + " and ".join(f"`{one}`" for one in searches),
        "",
        "Gain: the default's time over the tuned kernel's, timed in turn after the trials, by tokens in the batch;",
        "1.000 is the default itself. The logs have every setting that was tried, and what it gained.",
        "",
        markdown_row(["kernel", "trials", "failed", "settings", *(f"{rows:,} tokens" for rows in buckets)]),
        markdown_row(["---"] * (4 + len(buckets))),
    ]
    for name, found in kernels.items():
        result, trials = found.get("result"), found["trials"]
        failed = sum(bool(trial.error) for trial in trials)
        gains = [f"{result.gains[str(rows)]:.3f}x" if result and str(rows) in result.gains else "" for rows in buckets]
        settings = len({tuple(sorted(v["setting"].items())) for v in result.variants}) if result else 0
        lines.append(markdown_row([f"`{name}`", str(len(trials)), str(failed), str(settings), *gains]))
    return "\n".join(lines) + "\n"
