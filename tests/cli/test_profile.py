"""`turbo-tvm profile`: tables, JSON, the picture, errors."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runner import fail, succeed

from turbo_tvm.artifact import file as artifact
from turbo_tvm.cli import roofline_plot
from turbo_tvm.profiling import machine_limits
from turbo_tvm.profiling.roofline import MachineLimits

LIMITS = MachineLimits("a CPU", 1, "0", 1e12, 2e12, 1e10, 2e10, 1e11, 1 << 25)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Limits that take no measuring; whether each asking was for a fresh measurement."""
    asked: list[bool] = []

    def limits(threads: int, *, remeasure: bool, **_: object) -> MachineLimits:
        asked.append(remeasure)
        return replace(LIMITS, threads=threads)

    monkeypatch.setattr(machine_limits, "machine_limits", limits)
    return asked


def test_tables(tiny_artifact: Path):
    text = succeed("profile", tiny_artifact, "--lengths", "5,37", "--rounds", "2", "--threads", "1")
    for kernel in artifact.read(tiny_artifact).manifest.kernels:
        assert kernel.name in text
    for words in (
        *("2 sequences, 42 tokens (5, 37)", "medians of 2 rounds, threads: 1", "a CPU: fp32 1,000, bf16 2,000 GFLOP/s"),
        *("VM between kernels", "packing and unpacking (Python)", "tokens/s", "run() as usual", "the hook adds"),
    ):
        assert words in text


def test_json_has_samples_and_what_follows(tiny_artifact: Path):
    plain = json.loads(succeed("profile", tiny_artifact, "--lengths", "5 37", "--rounds", "3", "--json"))
    assert (plain["tokens"], plain["lengths"], len(plain["samples"]["run"])) == (42, [5, 37], 3)
    manifest = artifact.read(tiny_artifact).manifest
    assert {k["name"]: k["calls"] for k in plain["kernels"]} == {k.name: k.calls for k in manifest.kernels}
    shares = sum(k["share"] for k in plain["kernels"]) + (plain["vm_s"] + plain["python_s"]) / plain["total_s"]
    assert shares == pytest.approx(1)
    for kernel in plain["kernels"]:
        if kernel["fraction"] is not None:
            assert kernel["fraction"] == pytest.approx(kernel["floor_s"] / kernel["seconds"])
    assert plain["limits"]["cpu"] == "a CPU"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_picture(tiny_artifact: Path, tmp_path: Path, suffix: str, begins: bytes):
    path = tmp_path / f"roof{suffix}"
    succeed("profile", tiny_artifact, "--lengths", "9", "--rounds", "1", "--plot", path)
    written = path.read_bytes()
    assert written.startswith(begins)
    if suffix == ".svg":
        assert all(
            k.name.encode() in written for k in artifact.read(tiny_artifact).manifest.kernels if k.flops_per_pair
        )


@pytest.mark.parametrize("cache", [1e11, None])
def test_a_roof_far_above_the_memory_is_in_the_picture(cache: float | None):
    """AMX's limit of bf16 meets that of memory far to the right."""
    lines: dict[str, tuple[float, float]] = {}

    class Axes:
        def plot(self, xs: tuple[float, float], *_: object, label: str) -> None:
            lines[label.split(",")[0]] = xs

    roofline_plot._roofs(Axes(), replace(LIMITS, bf16_flops=3e13, cache=cache), [1.0])
    assert lines.keys() == {"memory", "fp32", "bf16", *(["last-level cache"] if cache else [])}
    assert all(start < end for start, end in lines.values())


def test_a_picture_without_matplotlib(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'turbo-tvm[plot]'" in fail("profile", tiny_artifact, "--lengths", "9", "--plot", "roof.png")


def test_remeasure(tiny_artifact: Path, known_limits: list[bool]):
    succeed("profile", tiny_artifact, "--lengths", "9", "--rounds", "1")
    succeed("profile", tiny_artifact, "--lengths", "9", "--rounds", "1", "--remeasure")
    assert known_limits == [False, True]


@pytest.mark.parametrize("args", [(), ("--lengths", "a"), ("--lengths", "0"), ("--lengths", "3", "--rounds", "0")])
def test_usage(tiny_artifact: Path, args: tuple):
    fail("profile", tiny_artifact, *args, code=2)


def test_other_pictures_are_refused(tiny_artifact: Path, tmp_path: Path):
    assert "must end in .png or .svg" in fail("profile", tiny_artifact, "--lengths", "3", "--plot", "roof.bmp", code=2)
    missing = tmp_path / "none" / "roof.png"
    assert "there is no directory" in fail("profile", tiny_artifact, "--lengths", "3", "--plot", missing)


def test_too_long_is_refused_before_measuring(tiny_artifact: Path, known_limits: list[bool]):
    assert "a sequence of 41 tokens is too long" in fail("profile", tiny_artifact, "--lengths", "3,41")
    assert not known_limits


def test_for_another_machine(tiny_artifact: Path, tmp_path: Path):
    opened = artifact.read(tiny_artifact)
    arch = "aarch64" if opened.manifest.target.triple_arch == "x86_64" else "x86_64"
    target = replace(opened.manifest.target, triple_arch=arch, features=())
    artifact.write(tmp_path / "o.turbo", replace(opened.manifest, target=target, members={}), b"-", opened.weights)
    assert f"was compiled for {arch}" in fail("profile", tmp_path / "o.turbo", "--lengths", "3")


def test_threads_that_are_refused(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    assert "must be a whole number from 1 to 2" in fail("profile", tiny_artifact, "--lengths", "3", "--threads", "99")
