"""Who takes part: built one after the other, checked against PyTorch, and absent with a reason if that fails."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import engines, strategies
from .measure import Entry
from .models import VOCABULARY
from .onnx_files import OnnxFiles
from .workloads import RAGGED, Workload

OURS = "turbo_tvm"
RIVALS = ("PyTorch", "torch.compile", "ONNX Runtime", "ONNX Runtime, optimised", "OpenVINO")
CHECK = Workload("check", "check", RAGGED, (3, 17, 40, 8))
LARGEST_DIFFERENCE = {"fp32": 1e-3}
LEAST_COSINE = {"bf16": 0.99}

Answer = Callable[[str, list[np.ndarray]], list[np.ndarray]]


@dataclass
class Field:
    """The contenders of one model in one precision. details and absent are part of the report."""

    built: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def entries(self, workload: Workload, seed: int) -> list[Entry]:
        """Every contender with every strategy it needs; inputs are ready before anything is timed."""
        sequences = workload.sequences(seed, VOCABULARY)
        made = []
        for name, engine in self.built.items():
            if name == OURS:
                made.append(Entry(name, strategies.RAGGED_INPUT, engine.prepare(sequences)))
                continue
            for strategy in strategies.for_workload(workload):
                calls = [engine.prepare(r) for r in strategies.rectangles(strategy, sequences)]
                made.append(Entry(name, strategy, _together(calls), engine.compilations))
        return made

    def close(self) -> None:
        self.built.clear()
        gc.collect()


def gather(
    model: Any,
    threads: int,
    precision: str,
    wanted: tuple[str, ...] | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> Field:
    """Build and check all contenders; `wanted` limits the rivals, and names the others as absent."""
    gathered = Field()
    expected = _expected(model, CHECK.sequences(0, VOCABULARY), threads)
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_bench_") as directory:
        for name, build in _builders(model, threads, precision, Path(directory)).items():
            if wanted is not None and name != OURS and name not in wanted:
                gathered.absent[name] = "not asked for"
                continue
            announce(name)
            _admit(gathered, name, build, expected, precision)
    return gathered


def _builders(model: Any, threads: int, precision: str, directory: Path) -> dict[str, Callable[[], Any]]:
    files = OnnxFiles(model, directory)
    return {
        OURS: lambda: engines.Turbo(model, threads, precision),
        "PyTorch": lambda: engines.TorchEager(model, threads, precision),
        "torch.compile": lambda: engines.TorchCompiled(model, threads, precision),
        "ONNX Runtime": lambda: engines.OnnxRuntime(files, threads, precision, optimised=False),
        "ONNX Runtime, optimised": lambda: engines.OnnxRuntime(files, threads, precision, optimised=True),
        "OpenVINO": lambda: engines.OpenVino(files, threads, precision),
    }


def _admit(gathered: Field, name: str, build: Callable[[], Any], expected: list[np.ndarray], precision: str) -> None:
    start = time.perf_counter()
    try:
        engine = build()
        seconds = time.perf_counter() - start
        check = compare(_answers(name, engine), expected)
    except ImportError as error:
        gathered.absent[name] = f"not installed: {reason(error)}"
        return
    except Exception as error:  # whatever an engine raises for a model that it cannot take: it stays in the report
        gathered.absent[name] = reason(error)
        return
    wrong = fault(check, precision)
    if wrong:
        gathered.absent[name] = wrong
        return
    gathered.built[name] = engine
    gathered.details[name] = {"build_s": round(seconds, 2), "check": check, **engine.details}


def _expected(model: Any, sequences: list[np.ndarray], threads: int) -> list[np.ndarray]:
    """PyTorch's fp32 answers, every sequence by itself."""
    engine = engines.TorchEager(model, threads, "fp32")
    return _unpack(engine, strategies.rectangles(strategies.ONE_BY_ONE, sequences), sequences)


def _answers(name: str, engine: Any) -> list[np.ndarray]:
    sequences = CHECK.sequences(0, VOCABULARY)
    if name == OURS:
        return engine.prepare(sequences)()
    return _unpack(engine, strategies.rectangles(strategies.PADDED, sequences), sequences)


def _unpack(engine: Any, rectangles: list[strategies.Rectangle], sequences: list[np.ndarray]) -> list[np.ndarray]:
    answers: list[Any] = [None] * len(sequences)
    for rectangle in rectangles:
        states = _numpy(engine.prepare(rectangle)())
        for state, i in zip(states, rectangle.rows, strict=True):
            answers[i] = state[: len(sequences[i])].copy()
    return answers


def compare(answers: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float]:
    """The largest absolute difference, and the least cosine of a sequence's answer to the expected one."""
    pairs = [(_numpy(a).ravel(), e.ravel()) for a, e in zip(answers, expected, strict=True)]
    cosines = [float(a @ e / (np.linalg.norm(a) * np.linalg.norm(e))) for a, e in pairs]
    return {"max_abs_diff": float(max(np.abs(a - e).max() for a, e in pairs)), "cosine": min(cosines)}


def fault(check: dict[str, float], precision: str) -> str | None:
    """Why these answers are wrong, or None."""
    limit, least = LARGEST_DIFFERENCE.get(precision), LEAST_COSINE.get(precision)
    if limit is not None and not check["max_abs_diff"] <= limit:  # NaN too
        return f"wrong answers: they differ from PyTorch's by up to {check['max_abs_diff']:.2g} (allowed: {limit:g})"
    if least is not None and not check["cosine"] > least:
        return f"wrong answers: cosine {check['cosine']:.4f} to PyTorch's in fp32 (needed: above {least:g})"
    return None


def reason(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else ""
    known = isinstance(error, engines.NotOffered | ImportError) or type(error).__module__.startswith("turbo_tvm")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _together(calls: list[Callable[[], Any]]) -> Callable[[], object]:
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(value.float() if hasattr(value, "bfloat16") else value, np.float32)
