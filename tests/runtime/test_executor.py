"""The executor: calls from many threads, thread counts, and memory that stays."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import tvm

import turbo_tvm
from turbo_tvm.errors import TurboError
from turbo_tvm.runtime import validation


def arrays(results: list) -> list[np.ndarray]:
    return [a for result in results for a in (result.values() if isinstance(result, dict) else [result])]


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run work(0) ... work(count - 1) at the same time; the first exception is raised here."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("names", [["bert"], ["bert", "answers", "padded"]], ids=["one model", "three models"])
def test_many_threads_get_their_own_answers(served, random_requests, names):
    models = [served(name).compiled for name in names]
    requests = random_requests(12)
    wanted = [[arrays(model.run(request)) for request in requests] for model in models]

    def work(number: int) -> None:
        order = random.Random(number)
        for _ in range(40):
            which, request = order.randrange(len(models)), order.randrange(len(requests))
            for got, want in zip(arrays(models[which].run(requests[request])), wanted[which][request], strict=True):
                np.testing.assert_array_equal(got, want)

    run_in_threads(6, work)


def test_two_models_run_at_the_same_time(served, random_requests):
    models = [served("bert").compiled, served("answers").compiled]
    request = random_requests(1)[0]
    wanted = [arrays(model.run(request)) for model in models]

    def work(number: int) -> None:
        for _ in range(60):
            for got, want in zip(arrays(models[number].run(request)), wanted[number], strict=True):
                np.testing.assert_array_equal(got, want)

    run_in_threads(2, work)


def test_every_number_of_threads_gives_the_same(served, random_requests, tmp_path):
    compiled = served("bert").compiled
    compiled.save(tmp_path / "model.turbo")
    requests = random_requests(4)
    for threads in range(1, (os.cpu_count() or 1) + 1):
        loaded = turbo_tvm.load(tmp_path / "model.turbo", threads=threads)
        assert loaded.threads == threads
        for request in requests:
            for got, want in zip(loaded.run(request), compiled.run(request), strict=True):
                np.testing.assert_array_equal(got, want)


def test_models_with_different_thread_counts_share_a_calling_thread(served, tmp_path):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("there is one core only")
    served("bert").compiled.save(tmp_path / "model.turbo")
    models = [turbo_tvm.load(tmp_path / "model.turbo", threads=threads) for threads in (1, 2)]
    used = tvm.get_global_func("runtime.NumThreads")
    for model in [*models, *models]:
        model.run([[5, 6, 7]])
        assert used() == model.threads


def test_outputs_are_copies_of_the_buffers(served):
    executor = served("bert").compiled._executor
    manifest = executor.manifest
    batch = validation.from_sequences([[5, 6, 7], [8]], None, manifest.request_limits, manifest.positions)
    results = executor.run(batch)
    views = [np.from_dlpack(t) for t in executor.buffers.tensors(executor.symbols([3, 1]))]
    for parts in results.values():
        assert all(not np.shares_memory(part, view) for part in parts for view in views)


def test_growing_and_shrinking_batches(served, random_requests):
    """Memory that was replaced for a larger batch is not used again for a smaller one."""
    compiled = served("bert").compiled
    one, large = [[5, 6, 7]], [s for r in random_requests(8, seed=5) for s in r]
    first = compiled.run(one)[0]
    for count in (1, len(large), 1, len(large) * 2, 1):
        compiled.run((large * 2)[:count])
        np.testing.assert_array_equal(compiled.run(one)[0], first)


def test_only_the_wanted_output_is_given(served):
    executor = served("bert").compiled._executor
    manifest = executor.manifest
    batch = validation.from_sequences([[5, 6, 7], [8]], None, manifest.request_limits, manifest.positions)
    everything = executor.run(batch)
    for name, parts in everything.items():
        (only,) = executor.run(batch, name).items()
        assert only[0] == name
        for one, other in zip(only[1], parts, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["bert", "padded"])
def test_a_shape_that_was_seen_makes_no_tensor(served, name, monkeypatch):
    compiled = served(name).compiled
    requests = [[[5, 6, 7]], [[8] * 30, [9]]]
    for request in requests:  # memory that grows drops the views of the shapes before
        compiled.run(request)
    wanted = [arrays(compiled.run(request)) for request in requests]
    for maker in ("tensor", "from_dlpack", "empty"):
        monkeypatch.setattr(tvm.runtime, maker, lambda *_, **__: pytest.fail("a tensor was made"))
    for request, want in zip(requests * 2, wanted * 2, strict=True):
        for got, other in zip(arrays(compiled.run(request)), want, strict=True):
            np.testing.assert_array_equal(got, other)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, MemoryError])
def test_what_goes_wrong_in_compiled_code_is_an_error_of_ours(served, error):
    compiled = served("bert").compiled

    def broken(*_args):
        raise error("inside the kernel")

    with (
        compiled._executor.calling(broken),
        pytest.raises(TurboError, match="failed: inside the kernel"),
    ):
        compiled.run([[5, 6, 7]])
    assert len(compiled.run([[5, 6, 7]])) == 1
