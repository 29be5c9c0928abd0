"""`turbo-tvm inspect`, and its memory plans."""

from __future__ import annotations

import json

import pytest
from cli_runner import fail, invoke, succeed

import turbo_tvm
from turbo_tvm.artifact import file as artifact

MODEL_OUTPUTS = ["last_hidden_state", "pooler_output"]


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
