"""`turbo-tvm run`: forms of requests and answers, and every refusal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from cli_runner import answers, fail, succeed


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


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
