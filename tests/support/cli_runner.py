"""The command line in this process: its result, its output, or its error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from click.testing import CliRunner, Result

from turbo_tvm.cli import main


def invoke(*args: object, input: str | bytes | None = None) -> Result:
    """What `turbo-tvm ARGS` did."""
    return CliRunner().invoke(main, [str(arg) for arg in args], input=input, prog_name="turbo-tvm")


def succeed(*args: object, input: str | bytes | None = None) -> str:
    """Its standard output."""
    result = invoke(*args, input=input)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: object, code: int = 1, input: str | bytes | None = None) -> str:
    """Its standard error."""
    result = invoke(*args, input=input)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception  # anything else would show a traceback
    return result.stderr


def command(*args: object, **options: Any) -> subprocess.CompletedProcess:
    """What `turbo-tvm ARGS` did in a process of its own."""
    line = [sys.executable, "-m", "turbo_tvm", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


def answers(output: str) -> list[dict]:
    """The answers that `turbo-tvm run` wrote as JSON lines."""
    return [json.loads(line) for line in output.splitlines()]
