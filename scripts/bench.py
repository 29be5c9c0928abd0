"""Time a compiled model beside ONNX Runtime and PyTorch: one process, one model, interleaved, same threads.

Every sample is one call after an untimed call of the same contender, so that caches and thread pools are its own. A
round times every contender once, in an order that rotates; ratios are taken round by round. The JSON keeps raw samples.

    scripts/bench                            BERT-base: the fixed shapes and the ragged set
    scripts/bench --model minilm --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import turbo_tvm
from turbo_tvm import config

MODELS = {
    "bert-base": transformers.BertConfig(),
    "minilm": transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
}
SHAPES = [(1, 16), (1, 128), (1, 512), (8, 128)]
PAUSE_S = 0.02  # worker threads of the last contender go to sleep
OURS = "turbo_tvm"


@dataclass
class Case:
    """One workload: contender -> a call that answers it; samples in seconds, in round order."""

    name: str
    tokens: int
    flops: float
    calls: dict[str, Callable[[], object]] = field(repr=False)
    samples: dict[str, list[float]] = field(default_factory=dict)


class Contenders:
    """The same model in every engine."""

    def __init__(self, model: torch.nn.Module, threads: int):
        self.model = model.eval()
        torch.set_num_threads(threads)
        self.compiled = turbo_tvm.compile(model, threads=threads)
        self.onnx = _onnx_session(model, threads)

    def turbo(self, sequences: list[np.ndarray]) -> Callable[[], object]:
        return lambda: self.compiled.run(sequences)

    def onnx_padded(self, sequences: list[np.ndarray]) -> Callable[[], object]:
        ids, mask = _pad(sequences)
        return lambda: self.onnx.run(None, {"input_ids": ids, "attention_mask": mask})

    def onnx_one_by_one(self, sequences: list[np.ndarray]) -> Callable[[], object]:
        calls = [self.onnx_padded([s]) for s in sequences]
        return lambda: [call() for call in calls]

    def onnx_grouped(self, sequences: list[np.ndarray], group: int = 4) -> Callable[[], object]:
        ordered = sorted(sequences, key=len)
        calls = [self.onnx_padded(ordered[i : i + group]) for i in range(0, len(ordered), group)]
        return lambda: [call() for call in calls]

    def torch_padded(self, sequences: list[np.ndarray]) -> Callable[[], object]:
        ids, mask = (torch.from_numpy(x) for x in _pad(sequences))

        def call() -> object:
            with torch.inference_mode():
                return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

        return call


def _onnx_session(model: torch.nn.Module, threads: int):
    import onnxruntime

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(directory) / "model.onnx")
        torch.onnx.export(
            Encoder(),
            (example, example),
            path,
            input_names=list(axes),
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _pad(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, sequences))
    ids, mask = np.zeros((2, len(sequences), width), np.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)], mask[i, : len(sequence)] = sequence, 1
    return ids, mask


def cases(contenders: Contenders, vocabulary: int, seed: int) -> list[Case]:
    """The fixed shapes, and 16 requests of lengths uniform in 5..500."""
    rng = np.random.default_rng(seed)
    workloads = [(f"({b}, {n})", [n] * b) for b, n in SHAPES]
    workloads.append(("16 x uniform 5..500", rng.integers(5, 501, 16).tolist()))
    made = []
    for name, lengths in workloads:
        sequences = [rng.integers(1, vocabulary, n) for n in lengths]
        calls = {
            OURS: contenders.turbo(sequences),
            "onnxruntime padded": contenders.onnx_padded(sequences),
            "torch eager padded": contenders.torch_padded(sequences),
        }
        if len(set(lengths)) > 1:
            calls["onnxruntime one by one"] = contenders.onnx_one_by_one(sequences)
            calls["onnxruntime sorted, groups of 4"] = contenders.onnx_grouped(sequences)
        made.append(Case(name, sum(lengths), _flops(contenders.compiled, lengths), calls))
    return made


def _flops(compiled: turbo_tvm.CompiledModel, lengths: list[int]) -> float:
    """Floating point operations that the requests need, without padding."""
    pairs = sum(n * n for n in lengths)
    kernels = compiled.manifest.kernels
    return sum(k.calls * (k.flops_per_token * sum(lengths) + k.flops_per_pair * pairs) for k in kernels)


def measure(case: Case, rounds: int, advance: Callable[[], None]) -> None:
    """Time every contender once per round, in rotating order."""
    names = list(case.calls)
    case.samples = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(PAUSE_S)
            case.calls[name]()
            start = time.perf_counter()
            case.calls[name]()
            case.samples[name].append(time.perf_counter() - start)
        advance()


def machine(threads: int) -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    packages = {}
    for package in ("turbo-tvm", "apache-tvm", "torch", "transformers", "onnxruntime", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "absent"
    return {
        "cpu": names[0] if names else platform.processor(),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "packages": packages,
    }


def summary(case: Case) -> list[tuple[str, float, float, float]]:
    """(contender, median ms, median of its round-by-round ratio to ours, GFLOP/s of needed work)."""
    ours = case.samples[OURS]
    rows = []
    for name, samples in case.samples.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(samples, ours, strict=True))
        median = statistics.median(samples)
        rows.append((name, median * 1e3, ratio, case.flops / median * 1e-9))
    return rows


def show(done: list[Case], title: str) -> None:
    table = Table("workload", "contender", "median ms", "times ours", "GFLOP/s of needed work", title=title)
    for case in done:
        for i, (name, ms, ratio, rate) in enumerate(summary(case)):
            label = f"{case.name}, {case.tokens} tokens" if i == 0 else ""
            table.add_row(label, name, f"{ms:.1f}", f"{ratio:.2f}", f"{rate:.0f}")
        table.add_section()
    Console(width=120).print(table)


def markdown(done: list[Case]) -> str:
    lines = ["| workload | contender | median ms | times ours | GFLOP/s of needed work |", "|---|---|---|---|---|"]
    for case in done:
        for name, ms, ratio, rate in summary(case):
            lines.append(f"| {case.name} | {name} | {ms:.1f} | {ratio:.2f} | {rate:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="bert-base")
    parser.add_argument("--rounds", type=int, default=7, help="samples per contender and workload (default 7)")
    parser.add_argument("--threads", type=int, help="threads for every contender; default: the physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="directory for JSON and Markdown")
    args = parser.parse_args()
    threads = config.num_threads(args.threads)
    settings = MODELS[args.model]
    torch.manual_seed(args.seed)
    print(f"preparing {args.model} in every engine (about a minute) ...", flush=True)
    contenders = Contenders(transformers.BertModel(settings), threads)
    done = cases(contenders, settings.vocab_size, args.seed)
    with Progress() as progress:
        task = progress.add_task("measuring", total=len(done) * args.rounds)
        for case in done:
            measure(case, args.rounds, lambda: progress.advance(task))
    show(done, f"{args.model}, fp32, {threads} threads")
    args.out.mkdir(parents=True, exist_ok=True)
    raw = [{"name": c.name, "tokens": c.tokens, "flops": c.flops, "samples_s": c.samples} for c in done]
    report = {"model": args.model, "seed": args.seed, "machine": machine(threads), "cases": raw}
    (args.out / f"{args.model}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{args.model}.md").write_text(markdown(done))
    print(f"raw samples: {args.out / args.model}.json")


if __name__ == "__main__":
    main()
