"""The repository stays small: summaries instead of samples, small pictures, and a bound on the whole tree."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from benchmark.render import PAGES
from benchmark.results import read_summary

ROOT = Path(__file__).resolve().parents[2]
SUMMARY_BYTES, PICTURE_BYTES, TREE_BYTES = 50_000, 60_000, 5_000_000
EARLIER = ["benchmarks/zen5/bert-base.json"]  # of the first version of the benchmark, whose page nobody writes again


@pytest.fixture(scope="module")
def committed() -> dict[str, int]:
    """Sizes in bytes of the files that git keeps, links left out."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return {str(p.relative_to(ROOT)): p.stat().st_size for p in paths if p.is_file() and not p.is_symlink()}


def test_no_summary_is_large(committed: dict[str, int]) -> None:
    found = {
        name: size for name, size in committed.items() if name.startswith("benchmarks/") and name.endswith(".json")
    }
    assert found and not {name: size for name, size in found.items() if size > SUMMARY_BYTES}


def test_no_picture_is_large(committed: dict[str, int]) -> None:
    pictures = {name: size for name, size in committed.items() if name.endswith((".png", ".svg"))}
    assert pictures and not {name: size for name, size in pictures.items() if size >= PICTURE_BYTES}


def test_the_tree_is_small(committed: dict[str, int]) -> None:
    largest = sorted(committed, key=lambda name: committed[name])[-10:]
    assert sum(committed.values()) < TREE_BYTES, f"the largest files are {largest}"


def test_no_samples_are_committed(committed: dict[str, int]) -> None:
    assert not [name for name in committed if name.endswith(".raw.json")]
    asked = ["git", "check-ignore", "-q", "benchmarks/mine/serving.raw.json"]
    assert subprocess.run(asked, cwd=ROOT).returncode == 0


def test_every_summary_says_what_it_was_made_from(committed: dict[str, int]) -> None:
    for name in committed:
        if name.startswith("benchmarks/") and name.endswith(".json"):
            assert re.fullmatch("[0-9a-f]{64}", json.loads((ROOT / name).read_text())["raw_sha256"]), name


def test_every_page_is_what_its_summary_says(committed: dict[str, int]) -> None:
    for name in committed:
        if name.startswith("benchmarks/") and name.endswith(".json") and name not in EARLIER:
            path = ROOT / name
            summary = read_summary(path)
            assert summary is not None
            text = PAGES[summary["page"]].markdown(summary, path.stem)
            assert path.with_suffix(".md").read_text() == text, f"{name}: run scripts/bench report benchmarks"
