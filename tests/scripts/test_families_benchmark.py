"""`scripts/bench models`: its figures and its page, and one tiny family from building to markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from benchmark import families
from benchmark.families import FAMILIES, Family
from benchmark.families_report import OURS, Result, best_rival, markdown, ours_s, summarized
from benchmark.measure import Limits
from rich.console import Console

MACHINE = {"cpu": "a CPU", "threads": 2, "packages": {"torch": "2", "onnxruntime": "1"}, "revision": "abc"}


def page(*results: Result) -> str:
    raw = {
        "command": "scripts/bench models",
        "requests": 16,
        "longest": 100,
        "machine": MACHINE,
        "results": [asdict(r) for r in results],
    }
    return markdown(summarized(raw))


def in_short(result: Result) -> dict[str, Any]:
    return summarized({"results": [asdict(result)]})["results"][0]


def test_the_best_rival_is_that_of_the_least_median_and_ratios_go_by_round():
    samples = {
        OURS: [1.0, 2.0, 1.0],
        "PyTorch, padded": [3.0, 3.0, 9.0],
        "ONNX Runtime, padded": [2.0, 8.0, 2.0],
    }
    result = in_short(Result("BERT", "ONNX", layout="packed", samples_s=samples))
    assert ours_s(result) == 1.0
    assert best_rival(result) == ("ONNX Runtime, padded", 2.0)


def test_without_samples_there_is_no_rival():
    assert best_rival(in_short(Result("BERT", "ONNX"))) is None
    assert ours_s(in_short(Result("BERT", "ONNX"))) is None


def test_a_page_says_what_is_packed_padded_and_not_compiled():
    good = Result(
        "A",
        "ONNX",
        layout="packed",
        kernels={"linear_8x8": 3},
        largest_difference=1e-6,
        samples_s={"turbo_tvm": [0.001]},
    )
    padded = Result("B", "PyTorch", layout="padded", declined=["padding was not removed: X"], largest_difference=2e-6)
    text = page(good, padded, Result("C", "ONNX", failed="SomeError: no"))
    assert "| A | ONNX | packed | 1 (3) | 1.0e-06 | 0 s | 1.0 ms |  |" in text
    assert "`linear_8x8` x 3" in text
    assert "B, PyTorch: padding was not removed: X" in text
    assert "C, ONNX: SomeError: no" in text


def test_every_family_has_a_name_of_its_own():
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)


@pytest.mark.slow
def test_a_tiny_family_from_building_to_markdown(tmp_path, monkeypatch):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
    }
    tiny = Family("tiny", "BertModel", "BertConfig", sizes)
    monkeypatch.setattr(families, "FAMILIES", (replace(tiny, name="other"), tiny))
    monkeypatch.setattr(families, "LIMITS", Limits(rounds=1, min_rounds=1, seconds=1.0))
    families.run(1, tmp_path, "tiny", "scripts/bench models", Console(quiet=True))
    results = [Result(**r) for r in json.loads((tmp_path / "models.raw.json").read_text())["results"]]
    assert [(r.family, r.route, r.failed, r.layout) for r in results] == [
        ("tiny", "PyTorch", None, "packed"),
        ("tiny", "ONNX", None, "packed"),
    ]
    assert all(r.largest_difference is not None and r.largest_difference < 1e-4 for r in results)
    assert best_rival(in_short(results[1])) is not None
    assert "| tiny | ONNX | packed |" in (tmp_path / "models.md").read_text()
