"""`turbo-tvm compile`."""

from __future__ import annotations

from cli_runner import command, fail, succeed

from turbo_tvm.artifact import file as artifact


class TestCompile:
    def test_writes_an_artifact_and_says_what_next(self, tiny_folder, tmp_path):
        path = tmp_path / "tiny model.turbo"
        done = command("compile", tiny_folder, "-o", path, "--name", "small", "--max-length", "20")
        assert done.returncode == 0, done.stderr
        assert "small (bert)" in done.stdout and "packed" in done.stdout
        assert f"next: turbo-tvm run '{path}' --text" in done.stdout
        assert "importing the model" in done.stderr
        manifest = artifact.read(path).manifest
        assert (manifest.name, manifest.request_limits.max_length) == ("small", 20)

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
