"""The command line of `scripts/gpu_check`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import checks
from .device import NoGpu, find

DESCRIPTION = """Check compiled models on this machine's NVIDIA GPU, and measure them.

parity       answers of BERT-base in fp32, fp16 and bf16 against PyTorch's on the CPU
reductions   softmax and residual + LayerNorm: achieved bandwidth, as a fraction of a measured copy
products     the matrix kernel with bias and GELU beside PyTorch's (cuBLAS)
attention    ragged attention beside PyTorch's scaled_dot_product_attention
models       BERT-base, batches and ragged requests, beside PyTorch and torch.compile
scheduler    the engine with the DP scheduler beside batches as they come

Prints one table and writes JSON with every sample. Needs nvcc; the comparisons need a PyTorch with CUDA, without which
only our own figures are given."""


def main() -> int:
    """Run what was asked for; 0 if all answers were right, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="which of the above; all by default")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check.json"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each measurement (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.checks if name not in checks.CHECKS]
    if unknown:
        parser.error(f"there is no check {unknown[0]!r}; there are {', '.join(checks.CHECKS)}")
    try:
        gpu = find()
    except NoGpu as missing:
        print(f"scripts/gpu_check: {missing}", file=sys.stderr)
        return 2
    out = Console()
    results: list[checks.Result] = []
    for name in arguments.checks or checks.CHECKS:
        with out.status(f"{name}: {gpu.name}") if out.is_terminal else out.capture():
            results.extend(checks.CHECKS[name](gpu, arguments.rounds))
        document = {"gpu": vars(gpu), "results": [vars(r) for r in results]}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    out.print(_table(gpu.name, results))
    print(f"wrote {arguments.out}")
    wrong = [r.what for r in results if r.wrong]
    if wrong:
        print(f"wrong answers: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _table(title: str, results: list[checks.Result]) -> Table:
    table = Table(title=title)
    for column in ("check", "what", "ours", "theirs", "ratio", "note"):
        table.add_column(column, justify="right" if column in ("ours", "theirs", "ratio") else "left")
    for r in results:
        theirs = "" if r.theirs is None else f"{r.theirs * 1e3:.3f} ms"
        ours = "" if r.ours is None else f"{r.ours * 1e3:.3f} ms"
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}x"
        table.add_row(r.check, r.what, ours, theirs, ratio, r.note)
    return table


if __name__ == "__main__":
    sys.exit(main())
