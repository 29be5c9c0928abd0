"""The command line: `turbo-tvm compile`, `inspect`, `run`, `serve`, `tune`, `profile`, `cost` and `simulate`.

Starting is quick: a command imports TVM, PyTorch or rich only when it does its work.
"""

from __future__ import annotations

import click

from turbo_tvm.cli.compile import compile_command
from turbo_tvm.cli.cost import cost_command
from turbo_tvm.cli.inspect import inspect_command
from turbo_tvm.cli.options import Commands, debug_option, print_version
from turbo_tvm.cli.profile import profile_command
from turbo_tvm.cli.run import run_command
from turbo_tvm.cli.serve import serve_command
from turbo_tvm.cli.simulate import simulate_command
from turbo_tvm.cli.tune import tune_command, tune_server_command

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Show versions."
)
@debug_option
def main() -> None:
    """Compile transformer encoders and answer ragged requests without padding.

    A model folder becomes one file that holds code, weights and tokenizer; the file answers texts or token ids of any
    lengths, in a process that needs neither PyTorch nor a compiler.

    \b
    First compile, then look inside, then run:
      turbo-tvm compile path/to/minilm -o minilm.turbo
      turbo-tvm inspect minilm.turbo
      turbo-tvm run minilm.turbo --text "How do plants eat?"

    `turbo-tvm COMMAND --help` explains a command, with examples.
    """


for command in (
    *(compile_command, inspect_command, run_command, serve_command, tune_command, tune_server_command),
    *(profile_command, cost_command, simulate_command),
):
    main.add_command(command)
