"""The command line: help, each command's output, exit codes, and what starting it imports."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_runner import fail, invoke, succeed

import turbo_tvm
from turbo_tvm import config
from turbo_tvm.artifact import file as artifact
from turbo_tvm.cli import main

MODEL_OUTPUTS = ["last_hidden_state", "pooler_output"]


@pytest.fixture(autouse=True)
def whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` and `compile` set up their whole process; this one has other tests to run."""
    monkeypatch.setattr(config, "quiet_model_loading", lambda: None)


@pytest.fixture(scope="module")
def loaded(tiny_artifact: Path) -> turbo_tvm.CompiledModel:
    return turbo_tvm.load(tiny_artifact)


@pytest.fixture(scope="module")
def without_tokenizer(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = artifact.read(tiny_artifact)
    path = tmp_path_factory.mktemp("artifacts") / "no_tokenizer.turbo"
    artifact.write(path, replace(opened.manifest, members={}), opened.library, opened.weights)
    return path


@pytest.fixture(scope="module")
def for_another_machine(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = artifact.read(tiny_artifact)
    arch = "aarch64" if opened.manifest.target.triple_arch == "x86_64" else "x86_64"
    target = replace(opened.manifest.target, name="cpu:other", triple_arch=arch, features=())
    path = tmp_path_factory.mktemp("artifacts") / "other.turbo"
    manifest = replace(opened.manifest, target=target, members={}, declined=("[red]odd\x1b[0m reason[/]",))
    artifact.write(path, manifest, b"this is not code", opened.weights)
    return path


def command(*args: object, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "turbo_tvm", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


def answers(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


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


class TestCompile:
    def test_writes_an_artifact_and_says_what_next(self, tiny_folder, tmp_path):
        path = tmp_path / "tiny model.turbo"
        done = command("compile", tiny_folder, "-o", path, "--name", "small", "--max-length", "20")
        assert done.returncode == 0, done.stderr
        assert "small (bert)" in done.stdout and "packed" in done.stdout
        assert f"next: turbo-tvm run '{path}' --text" in done.stdout
        assert "importing the model" in done.stderr
        manifest = artifact.read(path).manifest
        assert (manifest.name, manifest.bounds.max_length) == ("small", 20)

    def test_no_model(self, tmp_path):
        assert fail("compile", tmp_path / "none", "-o", tmp_path / "a.turbo").startswith("error: there is no model at")

    def test_unknown_target(self, tiny_folder, tmp_path):
        assert "error: unknown target" in fail("compile", tiny_folder, "-o", tmp_path / "a", "--target", "abacus")

    def test_unknown_precision(self, tiny_folder, tmp_path):
        assert "error: precision 'fp3'" in fail("compile", tiny_folder, "-o", tmp_path / "a", "--precision", "fp3")

    def test_help_names_the_precisions(self):
        assert "fp32, bf16 (AVX512-BF16, or GPUs" in " ".join(succeed("compile", "--help").split())

    def test_bf16_for_a_cpu_without_it(self, tiny_folder, tmp_path):
        options = "--precision", "bf16", "--target", "cpu:x86-64-v3"
        said = fail("compile", tiny_folder, "-o", tmp_path / "a", *options)
        assert "error: precision 'bf16' needs a CPU with AVX512-BF16, which x86-64-v3 lacks" in said

    def test_output_is_checked_before_the_work(self, tmp_path):
        assert "create it first" in fail("compile", "none", "-o", tmp_path / "no" / "a.turbo")
        assert "is a directory" in fail("compile", "none", "-o", tmp_path)

    def test_output_is_required(self):
        assert "--output" in fail("compile", "none", code=2)


class TestRun:
    def test_texts_as_json(self, tiny_artifact, loaded):
        lines = answers(succeed("run", tiny_artifact, "--text", "the cat sat", "--text", "a dog"))
        assert [line["text"] for line in lines] == ["the cat sat", "a dog"]
        expected = loaded.encode(["the cat sat", "a dog"])
        for i, (line, array) in enumerate(zip(lines, expected, strict=True)):
            assert line["index"] == i
            np.testing.assert_array_equal(np.array(line["outputs"]["last_hidden_state"], np.float32), array)

    def test_ids_with_commas_or_spaces(self, tiny_artifact):
        first, second = answers(succeed("run", tiny_artifact, "--ids", "2,5,7,3", "--ids", "2 5 7 3"))
        assert first["ids"] == [2, 5, 7, 3]
        assert first["outputs"] == second["outputs"]

    def test_other_output(self, tiny_artifact):
        (line,) = answers(succeed("run", tiny_artifact, "--text", "a", "--output", "pooler_output"))
        assert np.shape(line["outputs"]["pooler_output"]) == (32,)

    def test_lines_from_stdin(self, tiny_artifact):
        output = succeed("run", tiny_artifact, "--input", "-", input="the cat\r\n\na dog\u2028ran\n")
        assert [line["text"] for line in answers(output)] == ["the cat", "", "a dog\u2028ran"]

    def test_ids_from_a_file(self, tiny_artifact, tmp_path):
        path = tmp_path / "ids.txt"
        path.write_text("2,5,3\n2 3\n")
        assert [line["ids"] for line in answers(succeed("run", tiny_artifact, "--ids-file", path))] == [
            [2, 5, 3],
            [2, 3],
        ]

    def test_table(self, tiny_artifact):
        text = succeed("run", tiny_artifact, "--text", "the [b]cat[/b] sat", "--format", "table", "--threads", "1")
        assert "last_hidden_state" in text and "x 32" in text and "the [b]cat[/b] sat" in text

    def test_npy_of_equal_shapes(self, tiny_artifact, loaded, tmp_path):
        path = tmp_path / "vectors.npy"
        assert (
            succeed(
                "run", tiny_artifact, *("--text", "a", "--text", "the cat"), "--output", "pooler_output", "-o", path
            )
            == ""
        )
        np.testing.assert_array_equal(np.load(path), np.stack(loaded.encode(["a", "the cat"], output="pooler_output")))

    def test_npz_of_different_shapes(self, tiny_artifact, tmp_path):
        path = tmp_path / "vectors.npz"
        succeed("run", tiny_artifact, "--ids", "2,3", "--ids", "2,5,3", "-o", path)
        with np.load(path) as arrays:
            assert {name: arrays[name].shape for name in arrays} == {"0": (2, 32), "1": (3, 32)}

    def test_json_in_a_file(self, tiny_artifact, tmp_path):
        path = tmp_path / "vectors.jsonl"
        succeed("run", tiny_artifact, "--ids", "2,3", "-o", path)
        assert answers(path.read_text())[0]["ids"] == [2, 3]

    def test_npy_of_different_shapes_points_at_npz(self, tiny_artifact, tmp_path):
        path = tmp_path / "vectors.npy"
        assert "write vectors.npz instead" in fail("run", tiny_artifact, "--ids", "2,3", "--ids", "2,5,3", "-o", path)
        assert not path.exists()

    def test_unwritable_file(self, tiny_artifact, tmp_path):
        assert "error: cannot write" in fail("run", tiny_artifact, "--ids", "2", "-o", tmp_path / "no" / "a.npz")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((), "there is nothing to run"),
            (("--text", "a", "--ids", "1"), "cannot be mixed"),
            (("--ids", "1", "--format", "npy"), "add -o answers.npy"),
            (("--ids", "1", "-o", "answers"), "says no format"),
            (("--ids", "1", "--threads", "0"), "--threads"),
        ],
    )
    def test_usage(self, tiny_artifact, args, message):
        assert message in fail("run", tiny_artifact, *args, code=2)

    def test_a_file_that_is_no_image(self, tiny_artifact, tmp_path):
        for content, message in (
            (b"\x93NUMPY\x01\x00", "the input is a damaged .npy file"),
            (_npy(np.zeros(3)), r"array of shape (3,); images are (channels, height, width)"),
            (_npy(np.zeros((1, 1, 1), object)), "the input is a damaged .npy file"),
            (_npy(np.zeros((1, 2, 2))), "sequence 0 holds float64 values"),  # the model takes text
        ):
            assert message in fail("run", tiny_artifact, "--input", "-", input=content)
        assert "cannot be mixed" in fail("run", tiny_artifact, "--input", "-", "--text", "a", input=content, code=2)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--ids", "2,x"), "'2,x' is not a list of token ids"),
            (("--ids", "2,99"), "token id 99 is out of range"),
            (("--ids", ""), "sequence 0 is empty"),
            (("--ids", "2," * 41), "the model allows 40"),
            (("--text", "a", "--output", "logits"), "no output 'logits'"),
        ],
    )
    def test_bad_requests(self, tiny_artifact, args, message):
        error = fail("run", tiny_artifact, *args)
        assert error.startswith("error: ") and message in error

    def test_no_lines(self, tiny_artifact):
        assert "the input is empty" in fail("run", tiny_artifact, "--input", "-", input="")

    def test_not_utf8(self, tiny_artifact):
        assert "is not UTF-8" in fail("run", tiny_artifact, "--input", "-", input=b"\xff\xfe\n")

    def test_no_tokenizer(self, without_tokenizer):
        assert "carries no tokenizer" in fail("run", without_tokenizer, "--text", "a")
        assert answers(succeed("run", without_tokenizer, "--ids", "2,3"))

    def test_for_another_machine(self, for_another_machine):
        assert "was compiled for" in fail("run", for_another_machine, "--ids", "2,3")


class TestInspect:
    def test_tables(self, tiny_artifact):
        text = succeed("inspect", tiny_artifact)
        for part in ("tiny-bert (bert)", "can run it", "packed", *MODEL_OUTPUTS, "attention", "2 heads x 16"):
            assert part in text
        digest = artifact.read(tiny_artifact).manifest.members["library.so"].sha256
        assert digest[:16] in text

    def test_json_has_the_manifest_and_totals(self, tiny_artifact):
        found = json.loads(succeed("inspect", tiny_artifact, "--json"))
        assert found["file"]["bytes"] == tiny_artifact.stat().st_size
        assert [o["name"] for o in found["outputs"]] == MODEL_OUTPUTS
        assert set(found["members"]) == {"library.so", "weights.safetensors", "tokenizer.json"}
        # 4 products of a layer with 32 x 32 x (3 + 1 + 2 + 2) weights, at 2 FLOP each, and the smaller kernels
        assert 2 * 32 * 32 * 8 <= found["totals"]["flops_per_token"] < 3 * 32 * 32 * 8
        assert found["totals"]["flops_per_pair"] == 4 * 32
        assert "batch" not in found

    def test_lengths(self, tiny_artifact):
        found = json.loads(succeed("inspect", tiny_artifact, "--json", "--lengths", "12,40,3"))
        totals, batch = found["totals"], found["batch"]
        assert (batch["sequences"], batch["tokens"]) == (3, 55)
        pairs = 12 * 12 + 40 * 40 + 3 * 3
        assert batch["flops"] == totals["flops_per_token"] * 55 + totals["flops_per_pair"] * pairs
        assert batch["flops_padded"] == totals["flops_per_token"] * 120 + totals["flops_per_pair"] * 3 * 40 * 40
        assert batch["bytes_buffers"] >= 56 * 4 * (32 + 96 + 32)  # hidden, merged q, k and v, attention
        assert "3 sequences, 55 tokens" in succeed("inspect", tiny_artifact, "--lengths", "12 40 3")

    @pytest.mark.parametrize("value", ["", "a", "3,0", "2.5"])
    def test_bad_lengths(self, tiny_artifact, value):
        assert "--lengths" in fail("inspect", tiny_artifact, "--lengths", value, code=2)

    def test_lengths_beyond_the_model(self, tiny_artifact):
        assert "allows 40" in fail("inspect", tiny_artifact, "--lengths", "41")

    def test_for_another_machine(self, for_another_machine):
        text = succeed("inspect", for_another_machine)
        assert "cannot run it" in text
        assert "[red]odd\\x1b[0m reason[/]" in text  # shown, not obeyed

    def test_missing_file(self, tmp_path):
        assert "error: cannot use" in fail("inspect", tmp_path / "none.turbo")

    def test_damaged(self, tiny_artifact, tmp_path):
        data = bytearray(tiny_artifact.read_bytes())
        data[len(data) // 2] ^= 1
        path = tmp_path / "damaged.turbo"
        path.write_bytes(data)
        assert "damaged" in fail("inspect", path)
        assert "damaged" in fail("run", path, "--ids", "2,3")

    def test_debug_shows_the_traceback(self, tmp_path):
        for args in (("--debug", "inspect", tmp_path), ("inspect", tmp_path, "--debug")):
            assert isinstance(invoke(*args).exception, turbo_tvm.ArtifactError)


class TestMemory:
    def test_a_column_per_length_and_a_picture(self, tiny_artifact, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = succeed("inspect", tiny_artifact, "--memory", "--lengths", "12,40")
        for part in ("offset at 12", "offset at 40", "buffer_0", "linear_32x96", "1.000 x the lower bound", "(output)"):
            assert part in text
        assert (tmp_path / "tiny-memory.png").read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib_there_are_tables_and_a_hint(self, tiny_artifact, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("turbo_tvm.cli.inspect.can_plot", lambda: False)
        result = invoke("inspect", tiny_artifact, "--memory", "--lengths", "12")
        assert result.exit_code == 0 and "offset at 12" in result.stdout and "turbo-tvm[plot]" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_one_batch_as_svg(self, tiny_artifact, tmp_path):
        path = tmp_path / "plan.svg"
        text = succeed("inspect", tiny_artifact, "--memory", "--batch", "--lengths", "12,40,3", "--plot", path)
        assert "offset at 12+40+3" in text
        assert b"lower bound" in path.read_bytes()

    def test_json_has_every_place(self, tiny_artifact, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        reports = json.loads(succeed("inspect", tiny_artifact, "--memory", "--json", "--lengths", "12,40"))
        assert [r["lengths"] for r in reports] == [[12], [40]]
        for report in reports:
            assert report["peak"] == report["lower_bound"] and report["ratio"] == 1.0
            assert all(t["offset"] + t["size"] <= report["chunks"][t["chunk"]] for t in report["tensors"])
        assert list(tmp_path.iterdir()) == []

    def test_other_planners(self, tiny_artifact, tmp_path):
        options = ("--memory", "--lengths", "40", "--plot", tmp_path / "a.png")
        assert "2.1 MB in 1 chunk" in succeed("inspect", tiny_artifact, *options, "--strategy", "turbo2021")
        assert "chunks" in succeed("inspect", tiny_artifact, *options, "--strategy", "pooled")

    @pytest.mark.parametrize(
        ("options", "message", "code"),
        [
            (("--memory",), "--memory needs --lengths", 2),
            (("--lengths", "3", "--batch"), "--batch goes with --memory", 2),
            (("--lengths", "3", "--plot", "a.png"), "--plot goes with --memory", 2),
            (("--lengths", "3", "--strategy", "pooled"), "--strategy goes with --memory", 2),
            (("--memory", "--lengths", "3", "--plot", "a.pdf"), ".png or .svg", 2),
            (("--memory", "--lengths", "3", "--plot", "none/a.png"), "there is no directory", 1),
            (("--memory", "--lengths", "3,41"), "allows 40", 1),
        ],
    )
    def test_bad_options(self, tiny_artifact, options, message, code):
        assert message in fail("inspect", tiny_artifact, *options, code=code)

    def test_for_another_machine(self, for_another_machine, tmp_path):
        assert "lower bound" in succeed(
            "inspect", for_another_machine, "--memory", "--lengths", "9", "--plot", tmp_path / "a.png"
        )


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
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
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
            done = subprocess.run(line, input=lines, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.stderr == ""

    def test_interrupt_exits_130(self, monkeypatch):
        def interrupt(*_args):
            raise KeyboardInterrupt

        monkeypatch.setattr(artifact, "read", interrupt)
        assert invoke("inspect", "any.turbo").exit_code == 130
