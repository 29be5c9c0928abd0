"""Dead memory full of NaN: the answers of every model stay the same, and a plan that is wrong is found out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from memory_check import dead_memory_is_nan

from turbo_tvm.compiler import lowering, pipeline, targets
from turbo_tvm.errors import TurboError
from turbo_tvm.runtime import validation
from turbo_tvm.runtime.device.devices import aligned_empty
from turbo_tvm.runtime.executor import Executor
from turbo_tvm.runtime.loader import open_model
from turbo_tvm.schedules.cpu.tiles import cpu_tiles

MODELS = ("bert", "roberta", "mpnet", "mean", "answers", "padded")


def assert_same(got, want) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        if isinstance(g, dict):
            assert_same(list(g.values()), list(w.values()))
        else:
            assert np.isfinite(w).all()
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("name", MODELS)
def test_answers_do_not_depend_on_dead_memory(served, random_requests, name):
    compiled = served(name).compiled
    requests = random_requests(6, seed=7)
    wanted = [compiled.run(request) for request in requests]
    with dead_memory_is_nan(compiled._executor):
        for request, answers in zip(requests, wanted, strict=True):
            assert_same(compiled.run(request), answers)


def on_tvms_allocator(imported, model) -> Executor:
    """The import compiled once more, with its intermediates left to TVM's pooled allocator."""
    machine = targets.resolve("cpu")
    tiles = cpu_tiles(machine)
    optimized = pipeline.optimize(imported.mod, tiles, imported.request_limits.max_length)
    built = lowering.build(optimized, imported.weights, machine, planned=False)
    assert built.memory.buffers == ()
    manifest = replace(model.manifest, buffers=(), steps=())
    weights = {name: aligned(array) for name, array in built.parameters.items()}
    return Executor(built.executable.jit(), manifest, weights, model.threads)


def aligned(array: np.ndarray) -> np.ndarray:
    block = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    block[...] = array
    return block


@pytest.mark.parametrize("name", ["bert", "mpnet", "padded"])
def test_tvms_own_allocator_gives_the_same_answers(served, random_requests, name):
    ours, theirs = served(name).compiled._executor, on_tvms_allocator(served(name).imported(), served(name).compiled)
    for request in random_requests(10, seed=9):
        batch = validation.from_sequences(request, None, ours.manifest.request_limits, ours.manifest.positions)
        got, want = ours.run(batch), theirs.run(batch)
        assert got.keys() == want.keys()
        for output in got:
            assert_same(got[output], want[output])


def test_a_plan_that_gives_memory_away_too_early_is_found_out(served):
    artifact = served("bert").compiled._artifact
    buffers, steps = artifact.manifest.buffers, artifact.manifest.steps
    attention = next(b for b in buffers if steps[b.first].startswith("attention"))
    wrong = tuple(replace(b, last=b.first) if b is attention else b for b in buffers)
    broken = open_model(replace(artifact, manifest=replace(artifact.manifest, buffers=wrong)), 1)
    with dead_memory_is_nan(broken._executor):
        assert np.isnan(broken.run([[5, 6, 7]])[0]).all()


@pytest.mark.parametrize(
    ("steps", "message"), [(lambda s: s[:-1], "step .* is"), (lambda s: (*s, "more"), "steps, the artifact says")]
)
def test_steps_that_are_not_those_of_the_code_are_an_error(served, steps, message):
    compiled = served("bert").compiled
    executor = compiled._executor
    manifest = executor.manifest
    try:
        executor.manifest = replace(manifest, steps=steps(manifest.steps))
        with dead_memory_is_nan(executor), pytest.raises(TurboError, match=message):
            compiled.run([[5, 6, 7]])
    finally:
        executor.manifest = manifest


def test_bf16_in_place_gives_the_same_answers(served, random_requests):
    """Kernels that write over an input, and the same ones with memory of their own."""
    machine = targets.resolve("cpu")
    try:
        targets.check_precision(machine, "bf16")
    except TurboError:
        pytest.skip("needs a CPU with AVX512-BF16")
    compiled = served("bert", precision="bf16").compiled
    assert sum(b.replaces is not None for b in compiled.manifest.buffers) >= 2
    requests = random_requests(6, seed=11)
    compiled.memory_plan = "pooled"
    wanted = [compiled.run(request) for request in requests]
    compiled.memory_plan = "compact"
    with dead_memory_is_nan(compiled._executor):
        for request, answers in zip(requests, wanted, strict=True):
            assert_same(compiled.run(request), answers)
