"""One compile serves every batch and length: nothing is compiled, traced or allocated anew at run time."""

from __future__ import annotations

import subprocess
from collections import Counter

import pytest
import torch
import tvm
from tvm import relax

import turbo_tvm
from turbo_tvm.compiler import lowering, pipeline

COMPILERS = [
    (tvm, "compile"),
    (relax, "build"),
    (relax.VMExecutable, "export_library"),
    (torch.export, "export"),
    (torch, "compile"),
    (pipeline, "optimize"),
    (lowering, "build"),
    (subprocess, "Popen"),
]


@pytest.fixture
def compiler_calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each way to compile or trace was called since the test began."""
    calls: Counter[str] = Counter()
    for owner, name in COMPILERS:
        original = getattr(owner, name)

        def counted(*args, _original=original, _name=f"{owner.__name__}.{name}", **options):
            calls[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    return calls


def test_the_count_sees_a_compile(served, compiler_calls):
    module = served("bert").module
    compiler_calls.clear()  # the fixture's own
    turbo_tvm.compile(module, progress=False)
    once = ["torch.export.export", "turbo_tvm.compiler.pipeline.optimize", "turbo_tvm.compiler.lowering.build"]
    assert [compiler_calls[name] for name in [*once, "VMExecutable.export_library"]] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["bert", "mean", "padded"])
def test_hundreds_of_ragged_requests_compile_nothing(served, name, random_requests, compiler_calls):
    compiled = served(name).compiled
    compiler_calls.clear()  # the fixture's own
    shapes = set()
    for request in random_requests(300):
        results = compiled.run(request)
        shapes.add(tuple(len(sequence) for sequence in request))
        assert len(results) == len(request)
    assert len(shapes) > 250
    assert not compiler_calls


def test_loading_compiles_nothing(served, tmp_path, compiler_calls):
    served("bert").compiled.save(tmp_path / "model.turbo")
    compiler_calls.clear()
    turbo_tvm.load(tmp_path / "model.turbo").run([[5, 6, 7]])
    assert not compiler_calls


def test_a_repeated_trace_allocates_nothing(served, random_requests, tmp_path):
    # a model of its own: one that has served larger batches may still shrink
    served("bert").compiled.save(tmp_path / "model.turbo")
    model = turbo_tvm.load(tmp_path / "model.turbo")
    buffers = model._executor.buffers
    trace = random_requests(40)

    def run_all() -> tuple[int, dict]:
        for request in trace:
            model.run(request)
        return buffers.arena.bytes_held, {key: [id(view) for view in views] for key, views in buffers._views.items()}

    run_all()  # memory may grow here, which drops the views made before; the next round makes those again
    held_bytes, views = run_all()
    assert held_bytes > 0 and len(views) > 5
    for _ in range(3):
        assert run_all() == (held_bytes, views)
