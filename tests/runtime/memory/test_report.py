"""The memory plan as a report, and what a model says and does about its memory."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from turbo_tvm.errors import InputError, MemoryBudgetError, TurboError
from turbo_tvm.runtime.executor import ForeignExecutor
from turbo_tvm.runtime.memory.planner import STRATEGIES, lower_bound
from turbo_tvm.runtime.memory.report import memory_report
from turbo_tvm.runtime.model import CompiledModel


@pytest.fixture
def model(served, tmp_path):
    """A model of its own, since tests set its budget."""
    import turbo_tvm

    served("bert").compiled.save(tmp_path / "model.turbo")
    return turbo_tvm.load(tmp_path / "model.turbo")


class TestReport:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_says_where_every_tensor_lies(self, served, strategy):
        manifest = served("bert").compiled.manifest
        found = memory_report(manifest, [20, 3], strategy)
        assert [t.name for t in found.tensors] == [b.name for b in manifest.buffers]
        assert found.steps == manifest.steps and found.lengths == (20, 3)
        for tensor in found.tensors:
            assert tensor.offset + tensor.size <= found.chunks[tensor.chunk]
            assert tensor.size == np.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        assert found.total >= found.peak >= found.lower_bound
        assert found.ratio == found.peak / found.lower_bound

    def test_an_encoder_is_at_the_lower_bound(self, served):
        for lengths in ([1], [64], [3, 17, 64, 1]):
            assert memory_report(served("bert").compiled.manifest, lengths).ratio == 1.0

    def test_counts_rows_in_whole_tiles(self, served):
        manifest = served("bert").compiled.manifest
        hidden = memory_report(manifest, [manifest.row_tile + 1]).tensors[0]
        assert hidden.shape == (2, manifest.row_tile, 32)

    def test_of_a_padded_model_covers_the_padding(self, served):
        manifest = served("padded").compiled.manifest
        assert manifest.layout == "padded" and len(manifest.buffers) > 5
        assert memory_report(manifest, [2, 50]).peak == memory_report(manifest, [50, 50]).peak

    @pytest.mark.parametrize(
        ("lengths", "message"), [([], "at least one"), ([3, 0], "at least 1"), ([65], "allows 64")]
    )
    def test_refuses_lengths_that_the_model_cannot_answer(self, served, lengths, message):
        with pytest.raises(InputError, match=message):
            memory_report(served("bert").compiled.manifest, lengths)

    def test_refuses_an_unknown_strategy(self, served):
        with pytest.raises(TurboError, match=r"'tidy'.*compact"):
            memory_report(served("bert").compiled.manifest, [3], "tidy")


class TestModel:
    def test_reports_its_plan(self, model):
        report = model.memory_report([20, 3])
        assert report.strategy == "compact" and report.peak == model.peak_bytes([20, 3])
        model.memory_plan = "turbo2021"
        assert model.memory_report([20, 3]).strategy == "turbo2021"

    def test_holds_at_least_its_peak(self, model, random_requests):
        for request in random_requests(20):
            model.run(request)
            arena = model._executor.buffers.arena
            assert arena.bytes_held >= model.peak_bytes([len(s) for s in request])
            table, symbols = arena.table, model._executor.symbols([len(s) for s in request])
            assert lower_bound(table.records, table.sizes(symbols)) <= arena.bytes_held

    @pytest.mark.parametrize("strategy", ["turbo2021", "pooled", "static", "compact"])
    def test_every_strategy_gives_the_same_answers(self, model, random_requests, strategy):
        requests = random_requests(20)
        wanted = [model.run(request) for request in requests]
        model.memory_plan = strategy
        assert model.memory_plan == strategy
        for request, answers in zip(requests, wanted, strict=True):
            for got, want in zip(model.run(request), answers, strict=True):
                np.testing.assert_array_equal(got, want)

    def test_a_list_beyond_the_budget_runs_in_parts(self, model, random_requests):
        (request,) = random_requests(1, seed=3)
        wanted = model.run(request)
        model.memory_budget = model.peak_bytes([64]) + 64
        assert model.peak_bytes([len(s) for s in request]) > model.memory_budget
        for got, want in zip(model.run(request), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
        assert 0 < model._executor.buffers.arena.bytes_held <= model.memory_budget

    def test_a_sequence_beyond_the_budget_is_refused_before_anything_runs(self, model):
        model.memory_budget = model.peak_bytes([10])

        def never(*_args):
            raise AssertionError("a kernel ran")

        with model._executor.calling(never), pytest.raises(MemoryBudgetError, match="memory_budget"):
            model.run([[5] * 10, [5] * 64])
        assert len(model.run([[5] * 10])) == 1
        model.memory_budget = None
        assert len(model.run([[5] * 10, [5] * 64])) == 2

    def test_memory_that_is_replaced_is_freed_before_the_next_comes(self, model):
        """TVM's VM keeps its last results: they must not keep the chunk that they lie in."""
        model.run([[5]])
        old = weakref.ref(model._executor.buffers.arena.blocks[0].base)
        allocate = model._executor.buffers.arena._chunks._allocate
        alive = []
        model._executor.buffers.arena._chunks._allocate = lambda size: (alive.append(old()), allocate(size))[1]
        model.run([[5] * 64] * 9)
        assert alive == [None]

    def test_a_smaller_budget_frees_what_is_held_at_once(self, model):
        model.run([[5] * 64] * 9)
        model.memory_budget = model.peak_bytes([10])
        assert model._executor.buffers.arena.bytes_held == 0

    def test_lengths_may_be_numpy_numbers(self, model):
        lengths = np.array([64] * 9)
        assert model.peak_bytes(lengths) == model.peak_bytes([64] * 9) == model.memory_report(lengths).peak
        model.memory_budget = np.int64(model.peak_bytes(lengths))
        assert len(model.run([[5] * 64] * 9)) == 9

    @pytest.mark.parametrize("lengths", [[], [0], [65]])
    def test_peak_bytes_refuses_what_is_no_length(self, model, lengths):
        with pytest.raises(InputError):
            model.peak_bytes(lengths)

    def test_too_little_memory_is_an_error_of_ours(self, model):
        def full(size):
            raise MemoryError(f"no {size} bytes")

        model._executor.buffers.arena._chunks._allocate = full
        with pytest.raises(TurboError, match="not enough memory"):
            model.run([[5, 6]])

    def test_a_padded_call_is_bound_too(self, model):
        model.memory_budget = model.peak_bytes([10])
        with pytest.raises(MemoryBudgetError):
            model(np.full((1, 64), 5))

    @pytest.mark.parametrize("budget", [0, -5, 1.5, "1 GB", True])
    def test_a_budget_is_a_number_of_bytes(self, model, budget):
        with pytest.raises(InputError, match="memory_budget"):
            model.memory_budget = budget

    def test_an_unknown_plan_is_refused_and_the_old_one_stays(self, model):
        with pytest.raises(TurboError, match="'tidy'"):
            model.memory_plan = "tidy"
        assert model.memory_plan == "compact" and len(model.run([[5, 6]])) == 1

    def test_a_padded_model_has_no_largest_batch(self, served):
        with pytest.raises(TurboError, match="padded"):
            served("padded").compiled.memory_plan = "static"

    def test_for_another_machine_there_is_a_report_but_no_memory(self, model):
        foreign = CompiledModel(model._artifact, ForeignExecutor("it is another machine"))
        assert foreign.memory_report([5]).peak == model.peak_bytes([5])
        assert (foreign.memory_plan, foreign.memory_budget) == ("compact", None)
        with pytest.raises(TurboError, match="another machine"):
            foreign.peak_bytes([5])
        with pytest.raises(TurboError, match="another machine"):
            foreign.memory_budget = 100
