"""The command line of the benchmarks: `scripts/bench COMMAND`, see `parser`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from . import (
    artifacts,
    families,
    memory,
    overhead,
    scheduling,
    searches,
    server,
    serving,
    soak,
    tuning,
    tuning_pages,
)
from .contenders import RIVALS
from .encoder import PRECISIONS, Settings, run
from .measure import Limits
from .models import MODELS
from .render import render_directory

ENCODER = """Time compiled encoders beside PyTorch, torch.compile, ONNX Runtime (plain and with its transformer
optimiser) and OpenVINO: one process, interleaved, the same threads for everyone, every sample kept.

Workloads: a grid of batch 1, 8, 32 by length 8 to 512 (named 1x8 ... 32x512), and 32 ragged requests of
lengths uniform in 5..500, uniform in 2..100, and long-tailed (named ragged-...). Rivals answer ragged requests
padded, one by one, and sorted in groups of 4 and of 8. A rival that is not installed, fails to build or answers
wrongly is named with the reason.

Writes a summary, MODEL-PRECISION.json, after every workload, at last a page and a picture of it (.md, .png), and every
sample into MODEL-PRECISION.raw.json, whose sha256 is in the summary. All other benchmarks leave the same four files."""
EXAMPLES = """examples:
  scripts/bench --quick                               a smoke run of a few minutes: MiniLM-L6, three workloads
  scripts/bench --models bert-base --precisions fp32  one model in one precision
  scripts/bench --only ragged                         the ragged sets; --only 32x for a batch, --only 8x128 for a point
  scripts/bench --out benchmarks/mine --resume        everything; goes on where an interrupted run stopped
  scripts/bench report benchmarks/mine                pages and plots again from the summaries, without measuring"""
OVERHEAD = """Time what CompiledModel.run adds to its kernels on a one-layer toy model: Python and TVM's VM apart, with
hot and with cold caches. Prints and writes medians and quartiles: overhead.json, .md."""
MEMORY = """Compare how memory between kernels is planned, on traces of 1,000 requests (uniform 5..500, long-tailed,
short and long in turn, slowly growing): ours, the published algorithm, TVM's pooled allocator and one worst-case plan:
bytes held, allocated and freed, allocations, planning time, peak over lower bound. Then the growth of resident memory
of turbo_tvm, PyTorch and ONNX Runtime on the same traces, in a process each.
Writes memory.json, .md and .png."""
SERVING = """Serve random requests through turbo_tvm.Engine, by every policy, packed and padded: what rate it bears when
saturated, latency under Poisson arrivals at rising fractions of that, and the simulator on the same arrivals. Before
that, the time from submission to the first kernel in an idle engine.
Writes serving.json, .md and .png, after every load."""
SERVING_EXAMPLES = """examples:
  scripts/bench serving --models minilm-l6 --precisions fp32 --seconds 5    a look, in some minutes
  scripts/bench serving --models bert-base --layouts packed --policies nobatch dp --lengths 2..100
  scripts/bench serving --out benchmarks/mine --resume                      everything, some hours"""
SCHEDULER = """Time the scheduling policies on 1 to 1,000 waiting requests, and the simulator on a million requests over
64 replicas. Writes scheduling.json and .md."""
FAMILIES = """Compile one model of every supported family from PyTorch and from its ONNX file, compare it with PyTorch
and time it beside PyTorch and ONNX Runtime on ragged requests. Some minutes per family.
Writes models.json and .md, after every family."""
TUNING = """Compile every model twice, as it is by itself and with tuning logs, and run both in turn on the encoder
benchmark's workloads; and what compiling takes either way. Writes tuned.json and .md."""
SERVER = """Serve MiniLM-L6 with its real weights over HTTP, beside infinity-emb in an environment of its own, and load
both with sentences of mixed length: closed loops of 32 and 64, then Poisson arrivals at rising rates.
Writes server.json, .md and .png."""
SOAK = """Load the server for minutes at 0.8 of what it bears, and look whether its memory grows; then for seconds at
ten times that, and look what it refuses and whether it recovers. Writes soak.json, .md and .png."""
ARTIFACTS = """Run two artifacts of one model in turn in one process on the encoder benchmark's workloads: what a newer
version gained, or another way to compile. Writes artifacts.json and .md."""
SEARCHES = """Compare kernels as several directories of tuning logs have them, such as a shipped one, one of another
seed and one of a random search: each timed in turn with the first. Writes searches.json, .md
and .png, how the searches went."""
LOGS = """Write README.md beside the tuning logs of every target: where and how they were made, and what each kernel
gains."""
COMMANDS = (
    *("encoder", "models", "memory", "serving", "scheduler", "server", "soak"),
    *("tuning", "artifacts", "searches", "logs", "overhead", "report"),
)
QUICK_LIMITS = {"rounds": 3, "seconds": 5.0}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="scripts/bench", description="Benchmarks of compiled models.")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    encoder = commands.add_parser(
        "encoder",
        help="encoders beside their rivals (the default: scripts/bench --help)",
        description=ENCODER,
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    _encoder_options(encoder)
    _families_options(commands.add_parser("models", help="every family of models, by route", description=FAMILIES))
    _memory_options(
        commands.add_parser(
            "memory", help="memory between kernels, planned and measured", description=MEMORY, formatter_class=raw
        )
    )
    _serving_options(
        commands.add_parser(
            "serving",
            help="the engine under load, by scheduling policy",
            description=SERVING,
            epilog=SERVING_EXAMPLES,
            formatter_class=raw,
        )
    )
    _server_options(commands.add_parser("server", help="the server beside infinity-emb", description=SERVER))
    _soak_options(commands.add_parser("soak", help="the server over a long time", description=SOAK))
    _tuning_options(commands.add_parser("tuning", help="default kernels beside tuned ones", description=TUNING))
    _artifacts_options(commands.add_parser("artifacts", help="two artifacts of one model", description=ARTIFACTS))
    _searches_options(
        commands.add_parser("searches", help="tuned kernels by the search that found them", description=SEARCHES)
    )
    logs = commands.add_parser("logs", help="pages of the tuning logs", description=LOGS)
    logs.add_argument("directory", type=Path, nargs="?", default=Path("tuning_logs"), help="default %(default)s")
    _scheduler_options(
        commands.add_parser("scheduler", help="what planning and simulating take", description=SCHEDULER)
    )
    _overhead_options(commands.add_parser("overhead", help="what run() costs above its kernels", description=OVERHEAD))
    again = commands.add_parser("report", help="pages and plots again from summaries", description="Measures nothing.")
    again.add_argument("directory", type=Path, metavar="DIR", help="where the summaries are, folders below included")
    return made


def _encoder_options(encoder: argparse.ArgumentParser) -> None:
    limits = Limits()
    add = encoder.add_argument
    add("--models", nargs="+", choices=MODELS, help="default: all; with --quick minilm-l6")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    add("--rivals", nargs="+", choices=RIVALS, metavar="RIVAL", help=f"default: all of {', '.join(map(repr, RIVALS))}")
    add("--only", metavar="SUBSTRING", help="workloads whose name contains this")
    add("--quick", action="store_true", help="three workloads, at most 3 rounds and 5 s each, for a smoke run")
    add("--rounds", type=_positive, help=f"most rounds per workload (default {limits.rounds})")
    add(
        "--min-rounds",
        type=_positive,
        default=limits.min_rounds,
        help="rounds whatever they take (default %(default)s)",
    )
    add("--seconds", type=float, help=f"start no further round of a workload after this (default {limits.seconds:g})")
    add("--threads", type=_positive, help="for every contender (default: the physical cores)")
    add("--seed", type=int, default=0, help="of weights, lengths and token ids (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")
    add("--resume", action="store_true", help="skip what the raw file there holds of this machine and these versions")


def _families_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", metavar="SUBSTRING", help="families whose name contains this")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _memory_options(memory: argparse.ArgumentParser) -> None:
    add = memory.add_argument
    add("--model", choices=MODELS, default="bert-base", help="default %(default)s")
    add(
        "--measured",
        type=int,
        default=200,
        metavar="N",
        help="requests per trace and engine that are really run, 0 for none (default %(default)s)",
    )
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of weights, lengths and token ids (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _serving_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["minilm-l6", "bert-base"], help="default: minilm-l6, bert-base")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    add("--lengths", nargs="+", choices=serving.RANGES, default=list(serving.RANGES), help="default: all")
    add("--layouts", nargs="+", choices=serving.LAYOUTS, default=list(serving.LAYOUTS), help="default: all")
    add("--policies", nargs="+", choices=serving.POLICIES, default=list(serving.POLICIES), help="default: all")
    add(
        "--fractions",
        nargs="+",
        type=float,
        default=list(serving.FRACTIONS),
        help="rates of the trials, as parts of what a policy bears when saturated (default %(default)s)",
    )
    add("--seconds", type=float, default=10.0, help="a trial lasts at least so long (default %(default)g)")
    add("--longest", type=float, default=40.0, help="and at most, even if fewer than 300 come (default %(default)g)")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of weights, arrivals and token ids (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")
    add("--resume", action="store_true", help="keep the loads that serving.raw.json holds of this machine and version")


def _server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="of MiniLM-L6, such as scripts/demo leaves")
    add("--texts", type=_positive, default=600, help="distinct ones (default %(default)s)")
    add("--rounds", type=_positive, default=3, help="of closed loops (default %(default)s)")
    add("--seconds", type=float, default=15.0, help="of Poisson arrivals per rate (default %(default)g)")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of texts and arrivals (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _soak_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help="of an embedding model")
    add("--minutes", type=float, default=10.0, help="default %(default)g")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of texts and arrivals (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _tuning_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["bert-base"], help="default: bert-base")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    add("--logs", type=Path, default=Path("tuning_logs"), help="directory of the logs (default %(default)s)")
    add("--only", metavar="SUBSTRING", help="workloads whose name contains this")
    add("--seconds", type=float, default=8.0, help="per workload, beyond five rounds (default %(default)g)")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of weights, lengths and token ids (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _artifacts_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("artifacts", type=Path, nargs=2, metavar="ARTIFACT", help="the first one's time is over the second's")
    add("--names", nargs=2, default=["before", "after"], metavar="NAME", help="default: before after")
    add("--only", metavar="SUBSTRING", help="workloads whose name contains this")
    add("--seconds", type=float, default=4.0, help="per workload, beyond five rounds (default %(default)g)")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of lengths and token ids (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _searches_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="whose kernels")
    add(
        "--logs", type=Path, nargs="+", required=True, metavar="DIR", help="the reference, and what is compared with it"
    )
    add("--kernels", nargs="+", default=[], metavar="WORD", help="only those whose names contain one of these")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _scheduler_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--requests", type=_positive, default=scheduling.REQUESTS, help="that are simulated (default %(default)s)")
    add("--seed", type=int, default=0, help="of lengths and arrivals (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _overhead_options(overhead: argparse.ArgumentParser) -> None:
    add = overhead.add_argument
    add("--rounds", type=_positive, default=500, help="hot rounds per workload (default %(default)s)")
    add("--threads", type=_positive, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of weights, lengths and token ids (default %(default)s)")
    add("--out", type=Path, default=Path("bench_results"), help="output directory (default %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is needed, not {text!r}")
    return int(text)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The parsed command line; `encoder` where no command is named."""
    return parser().parse_args(argv if argv and argv[0] in COMMANDS else ["encoder", *argv])


def settings(args: argparse.Namespace, argv: list[str]) -> Settings:
    names = args.models or (["minilm-l6"] if args.quick else list(MODELS))
    usual = QUICK_LIMITS if args.quick else {"rounds": Limits.rounds, "seconds": Limits.seconds}
    rounds = args.rounds or int(usual["rounds"])
    limits = Limits(
        rounds=rounds,
        min_rounds=min(args.min_rounds, rounds),
        seconds=usual["seconds"] if args.seconds is None else args.seconds,
    )
    return settings_of(Settings, args, argv, models={name: MODELS[name] for name in names}, limits=limits)


def settings_of(kind: Any, args: argparse.Namespace, argv: list[str], **others: Any) -> Any:
    """A command's settings: fields that are called as its options are, and others."""
    from turbo_tvm import config

    given = {field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given |= {"command": shlex.join(["scripts/bench", *argv]), "threads": config.num_threads(args.threads)}
    return kind(**given | others)


def memory_settings(args: argparse.Namespace, argv: list[str]) -> memory.Settings:
    return settings_of(memory.Settings, args, argv, sizes=MODELS[args.model])


def serving_settings(args: argparse.Namespace, argv: list[str]) -> serving.Settings:
    return settings_of(
        serving.Settings,
        args,
        argv,
        models={name: MODELS[name] for name in args.models},
        ranges=tuple(args.lengths),
        policies=tuple(p for p in serving.POLICIES if p in args.policies),
    )


def tuning_settings(args: argparse.Namespace, argv: list[str]) -> tuning.Settings:
    return settings_of(tuning.Settings, args, argv, models={name: MODELS[name] for name in args.models})


def main(argv: list[str]) -> int:
    args = arguments(argv)
    console = Console(soft_wrap=True, highlight=False)
    if args.command == "report":
        if render_directory(args.directory, console):
            return 0
        print(f"error: there are no results in {args.directory}", file=sys.stderr)
        return 1
    if args.command == "logs":
        return 0 if tuning_pages.run(args.directory, console) else 1
    try:
        if args.command == "overhead":
            from turbo_tvm import config

            command = shlex.join(["scripts/bench", *argv])
            overhead.run(args.rounds, config.num_threads(args.threads), args.seed, args.out, command, console)
        elif args.command == "models":
            from turbo_tvm import config

            command = shlex.join(["scripts/bench", *argv])
            families.run(config.num_threads(args.threads), args.out, args.only, command, console)
        elif args.command == "tuning":
            tuning.run(tuning_settings(args, argv), console)
        elif args.command == "server":
            server.run(settings_of(server.Settings, args, argv), console)
        elif args.command == "soak":
            soak.run(settings_of(soak.Settings, args, argv), console)
        elif args.command == "artifacts":
            artifacts.run(settings_of(artifacts.Settings, args, argv), console)
        elif args.command == "searches":
            searches.run(settings_of(searches.Settings, args, argv), console)
        elif args.command == "scheduler":
            scheduling.run(shlex.join(["scripts/bench", *argv]), args.seed, args.requests, args.out, console)
        elif args.command == "serving":
            serving.run(serving_settings(args, argv), console)
        elif args.command == "memory":
            memory.run(memory_settings(args, argv), console)
        else:
            run(settings(args, argv), console)
    except KeyboardInterrupt:
        resumable = args.command in ("encoder", "serving")
        kept = f": {args.out} holds every finished workload; go on with --resume" if resumable else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
