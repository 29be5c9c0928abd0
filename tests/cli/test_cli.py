"""The command line as a whole: help, errors, exit codes, and what starting it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from cli_runner import answers, command, fail, invoke, succeed

import turbo_tvm
from turbo_tvm.artifact import file as artifact
from turbo_tvm.cli import main


class TestHelp:
    def test_top_level_shows_the_flow(self):
        text = succeed("--help")
        places = [text.index(f"turbo-tvm {name} ") for name in ("compile", "inspect", "run")]
        assert places == sorted(places)

    @pytest.mark.parametrize("name", ["compile", "inspect", "run"])
    def test_every_command_has_examples(self, name):
        text = succeed(name, "--help")
        assert "Examples:\n" in text
        assert text.count(f"turbo-tvm {name} ") >= 3

    @pytest.mark.parametrize("name", ["compile", "inspect", "run"])
    def test_examples_use_options_that_exist(self, name):
        known = {option for param in main.commands[name].params for option in param.opts}
        examples = succeed(name, "--help").split("Examples:\n")[1].split("\n\n")[0]
        lines = [line.split("|")[0] for line in examples.splitlines() if f"turbo-tvm {name}" in line]
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", "\n".join(lines))) <= known

    def test_version_names_both(self):
        text = succeed("--version")
        assert text.startswith(f"turbo-tvm {turbo_tvm.__version__} (TVM 0.")

    def test_unknown_command_is_a_usage_error(self):
        assert "No such command" in fail("fly", code=2)


class TestProcess:
    """The real command, in its own process."""

    @staticmethod
    def imported(*args: object) -> set[str]:
        """The top-level modules that a command leaves imported."""
        code = (
            "import sys\nfrom turbo_tvm.cli import main\n"
            "try: main(sys.argv[1:], prog_name='turbo-tvm')\n"
            "finally: print('\\n', *{n.split('.')[0] for n, m in sys.modules.items() if m}, file=sys.stderr)"
        )
        line = [sys.executable, "-c", code, *map(str, args)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return set(done.stderr.splitlines()[-1].split())

    @pytest.mark.parametrize("args", [("--help",), ("--version",), ("run", "--help")])
    def test_help_imports_nothing_heavy(self, args):
        assert not self.imported(*args) & {"tvm", "tvm_ffi", "torch", "numpy", "rich"}

    def test_inspect_imports_no_tvm(self, tiny_artifact):
        assert not self.imported("inspect", tiny_artifact) & {"tvm", "tvm_ffi", "torch", "transformers"}

    def test_run_imports_no_torch(self, tiny_artifact):
        modules = self.imported("run", tiny_artifact, "--text", "the cat")
        assert "tvm" in modules
        assert not modules & {"torch", "transformers", "onnx", "onnxruntime"}

    def test_same_answers_as_in_process(self, tiny_artifact, loaded):
        done = command("run", tiny_artifact, "--ids", "2,5,3")
        assert done.returncode == 0, done.stderr
        values = answers(done.stdout)[0]["outputs"]["last_hidden_state"]
        np.testing.assert_array_equal(np.array(values, np.float32), loaded.run([[2, 5, 3]])[0])

    def test_error_is_one_line(self, tmp_path):
        done = command("inspect", tmp_path / "none.turbo")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

    def test_broken_pipe_is_silent(self, tiny_artifact):
        lines = "the cat sat on the mat\n" * 200
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as closed:
            line = [sys.executable, "-m", "turbo_tvm", "run", str(tiny_artifact), "--input", "-"]
            done = subprocess.run(line, input=lines, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)
        assert done.stderr == ""

    def test_interrupt_exits_130(self, monkeypatch):
        def interrupt(*_args):
            raise KeyboardInterrupt

        monkeypatch.setattr(artifact, "read", interrupt)
        assert invoke("inspect", "any.turbo").exit_code == 130
