"""The engine: right answers to everyone, once, in batches; limits, faults, cancellation, drain; real models too."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest
from fake_model import FakeModel

from turbo_tvm import Engine
from turbo_tvm.errors import DeadlineError, EngineError, InputError, OverloadError, TurboError
from turbo_tvm.runtime.scheduling.engine import ALL_OUTPUTS
from turbo_tvm.runtime.scheduling.response_cache import ResponseCache
from turbo_tvm.runtime.scheduling.triggers import Lazy

GUILTY = 666


def engine(model, **options) -> Engine:
    return Engine(model, **{"progress": False, **options})


def blocked(fake):
    """Hold the model's first batch until `fake.gate` is set."""
    fake.gate.clear()


def until_running(fake) -> None:
    assert fake.entered.acquire(timeout=30)


def answers_to(serving, fake, requests) -> list:
    """The answers to requests that were all submitted before the first batch was done."""
    blocked(fake)
    futures = [serving.submit(request) for request in requests]
    fake.gate.set()
    return [future.result(60) for future in futures]


class TestAnswers:
    def test_from_threads_coroutines_and_futures(self, fake):
        with engine(fake) as serving:
            np.testing.assert_array_equal(serving.infer_sync([1, 2, 3]), [6, 3])
            np.testing.assert_array_equal(serving.submit(np.array([4, 5])).result(60), [9, 2])
            np.testing.assert_array_equal(serving.infer_sync("ab"), fake.right([97, 98]))

            async def ask():
                return await asyncio.gather(
                    *(serving.infer([i, i]) for i in range(20)), serving.infer([7], timeout_s=9)
                )

            answers = asyncio.run(ask())
        assert [a.tolist() for a in answers] == [[2 * i, 2] for i in range(20)] + [[7, 1]]
        assert serving.statistics.answered == 24 and serving.statistics.pending == 0

    def test_an_engine_of_a_coroutine(self, fake):
        async def main():
            async with engine(fake) as serving:
                return await serving.infer([1, 2])

        assert asyncio.run(main()).tolist() == [3, 2]

    def test_what_waits_runs_together(self, fake):
        with engine(fake, cache=0) as serving:
            blocked(fake)
            first = serving.submit([1])
            until_running(fake)
            others = [serving.submit([i] * i) for i in range(2, 10)]
            fake.gate.set()
            assert [f.result(60).tolist() for f in (first, *others)] == [[i * i, i] for i in range(1, 10)]
        assert [sorted(b) for b in fake.batches] == [[1], list(range(2, 10))]
        found = serving.statistics
        assert (found.batches, found.batch_size.total, found.batch_tokens.total) == (2, 9, 45)
        assert (found.rows, found.padding_rows) == (4 + 44, 3)

    @pytest.mark.parametrize("caps", [{"max_batch": 3}, {"max_tokens": 30}])
    def test_caps(self, fake, caps):
        with engine(fake, **caps) as serving:
            answers_to(serving, fake, [[i] * 10 for i in range(10)])
        assert max(len(b) for b in fake.batches) == 3

    def test_the_memory_budget_is_a_cap(self, fake):
        fake.memory_budget = 100 * 64  # bytes: as many tokens as the scheduler's smallest step
        with engine(fake) as serving:
            answers_to(serving, fake, [[i] * 30 for i in range(6)])
        assert max(sum(b) for b in fake.batches) == 60

    def test_several_models_serve_one_queue(self, fakes):
        models = [fakes(), fakes()]
        for model in models:
            blocked(model)
        with engine(models, max_batch=1) as serving:
            futures = [serving.submit([i]) for i in range(4)]
            for model in models:  # both are at work, before either goes on and takes what the other is to have
                until_running(model)
            for model in models:
                model.gate.set()
            assert [f.result(60).tolist() for f in futures] == [[i, 1] for i in range(4)]
        assert sum(len(model.batches) for model in models) == 4


class TwoOutputs(FakeModel):
    """Of a sequence, its sum and its length, apart."""

    def output_name(self, asked):
        if asked not in (None, "sum", "length"):
            raise InputError(f"the model has no output {asked!r}")
        return asked or "sum"

    def answer(self, parts, output=None):
        rows = [dict(zip(("sum", "length"), row[:, None], strict=True)) for row in super().answer(parts)]
        return rows if output is None else [row[output] for row in rows]


class TestOutputs:
    def test_each_request_has_its_own(self):
        model = TwoOutputs()
        with engine(model) as serving:
            blocked(model)
            asked = [None, "length", ALL_OUTPUTS, "sum", "length"]
            futures = [serving.submit([5, 6], output=output) for output in asked]
            model.gate.set()
            first, second, third, fourth, fifth = (future.result(60) for future in futures)
            assert first.tolist() == fourth.tolist() == [11] and second.tolist() == fifth.tolist() == [2]
            assert {name: value.tolist() for name, value in third.items()} == {"sum": [11], "length": [2]}
            with pytest.raises(InputError, match="no output 'x'"):
                serving.submit([1], output="x")
        assert sum(map(len, model.batches)) == 3  # the same sequence with the same output runs once

    def test_the_cache_knows_them_apart(self):
        model = TwoOutputs()
        with engine(model) as serving:
            for _ in range(2):
                assert serving.infer_sync([5, 6], output="length").tolist() == [2]
                assert serving.infer_sync([5, 6]).tolist() == [11]
        assert len(model.batches) == 2 and serving.statistics.cache_hits == 2


class TestObserver:
    def test_is_told_of_every_batch(self, fake):
        told = []
        with engine(fake, cache=0, on_batch=told.append) as serving:
            answers_to(serving, fake, [[1], [2, 2], [3, 3, 3]])
        assert sorted(n for record in told for n in record.lengths) == [1, 2, 3]
        for record in told:
            assert record.rows % 4 == 0 and record.seconds > 0 and record.predicted_s > 0
            assert len(record.waited_s) == len(record.lengths) and min(record.waited_s) >= 0

    def test_its_faults_are_its_own(self, fake, caplog):
        def fail(record):
            raise ValueError("a fault of the observer")

        with engine(fake, on_batch=fail) as serving:
            assert serving.infer_sync([1, 2]).tolist() == [3, 2]
            assert serving.infer_sync([1, 3]).tolist() == [4, 2]
        assert "a fault of the observer" in caplog.text


class TestCache:
    def test_repeated_requests_do_not_run_again(self, fake):
        with engine(fake) as serving:
            first = serving.infer_sync([1, 2])
            first[0] = 99
            assert serving.infer_sync([1, 2]).tolist() == [3, 2]
            assert serving.infer_sync([1, 2], token_type_ids=[0, 1]).tolist() == [3, 2]
        assert len(fake.batches) == 2
        assert serving.statistics.cache_hits == 1

    def test_identical_requests_in_flight_run_once(self, fake):
        with engine(fake, cache=0) as serving:
            blocked(fake)
            futures = [serving.submit([5, 5]) for _ in range(5)]
            until_running(fake)
            futures.append(serving.submit([5, 5]))
            fake.gate.set()
            assert all(f.result(60).tolist() == [10, 2] for f in futures)
        assert len(fake.seen) == 1 and serving.statistics.shared == 5

    def test_who_shares_and_cancels_does_not_take_it_from_the_others(self, fake):
        with engine(fake) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            first, second = serving.submit([5]), serving.submit([5])
            assert first.cancel()
            fake.gate.set()
            assert second.result(60).tolist() == [5, 1]

    def test_engines_may_share_one(self, fakes):
        cache = ResponseCache(1 << 20)
        models = [fakes(), fakes()]
        for model in models:
            with engine(model, cache=cache) as serving:
                serving.infer_sync([1, 2])
        assert [len(model.batches) for model in models] == [1, 0]

    def test_failures_are_not_kept(self, fake):
        with engine(fake) as serving:
            for _ in range(2):
                with pytest.raises(ValueError, match="guilty"):
                    serving.infer_sync([GUILTY])
        assert len(fake.batches) == 2


class TestFaults:
    def test_only_the_guilty_request_gets_the_error(self, fake):
        with engine(fake) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            futures = [serving.submit([i, GUILTY] if i == 4 else [i, 0]) for i in range(2, 8)]
            fake.gate.set()
            for i, future in enumerate(futures, 2):
                if i == 4:
                    with pytest.raises(ValueError, match="the guilty token"):
                        future.result(60)
                else:
                    assert future.result(60).tolist() == [i, 2]
        assert (serving.statistics.failed, serving.statistics.retries) == (1, 6)

    def test_a_batch_that_fails_by_chance_is_answered_after_all(self, fake):
        errors = iter([TurboError("a hiccup")])
        with engine(fake) as serving:
            blocked(fake)
            futures = [serving.submit([i]) for i in range(4)]
            until_running(fake)
            fake.gate.set()
            futures[0].result(60)
            blocked(fake)
            more = [serving.submit([i, i]) for i in range(4)]
            until_running(fake)
            fake.fail = lambda: next(errors, None)
            fake.gate.set()
            assert all(f.result(60) is not None for f in (*futures, *more))

    def test_too_few_answers_are_an_error(self, fake):
        fake.right = lambda ids: None
        answer = fake.answer
        fake.answer = lambda parts, output=None: answer(parts, output)[1:]
        with engine(fake) as serving, pytest.raises(TurboError, match="gave 0 answers to 1 requests"):
            serving.infer_sync([1])

    def test_a_fault_of_the_engine_itself_reaches_everyone(self, fake):
        class Broken:
            def __call__(self, lengths):
                raise ZeroDivisionError("in the cost")

        serving = engine(fake, cost=Broken(), trigger=Lazy(timeout_s=0.2)).start()
        future = serving.submit([1])
        with pytest.raises(EngineError, match="the engine stopped: ZeroDivisionError: in the cost"):
            future.result(60)
        with pytest.raises(EngineError, match="the engine stopped"):
            serving.submit([2])
        serving.close()

    def test_bad_input_is_refused_at_once_and_harms_nobody(self, fake):
        with engine(fake) as serving:
            for wrong in ([], [1000], [-1], [0.5], [[1]], [1] * 513, None, object()):
                with pytest.raises(InputError):
                    serving.submit(wrong)
            for types in ([1], [0, 5]):
                with pytest.raises(InputError):
                    serving.submit([1, 2], token_type_ids=types)
            with pytest.raises(InputError, match="a text brings its own"):
                serving.submit("text", token_type_ids=[0])
            for priority in ("high", 1.5, True):
                with pytest.raises(InputError, match="priority"):
                    serving.submit([1], priority=priority)
            for timeout in (0, -1, float("nan"), "1", True, 1e10):
                with pytest.raises(InputError, match="timeout_s"):
                    serving.submit([1], timeout_s=timeout)
            assert serving.infer_sync([1]).tolist() == [1, 1]
        assert serving.statistics.submitted == 1


class TestTime:
    def test_a_request_that_expires_never_runs(self, fake):
        with engine(fake) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            future = serving.submit([2], timeout_s=0.01)
            with pytest.raises(DeadlineError):
                serving.infer_sync([3], timeout_s=0.02)
            fake.gate.set()
            with pytest.raises(DeadlineError):
                future.result(60)
            serving.infer_sync([4])
        assert {s[0] for s in fake.seen} == {1, 4}
        assert serving.statistics.expired == 2

    def test_time_that_ends_while_it_runs(self, fake):
        with engine(fake) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            with pytest.raises(DeadlineError, match="while the request ran"):
                serving.infer_sync([1], timeout_s=0.05)

            async def ask():
                await serving.infer([1], timeout_s=0.05)

            with pytest.raises(DeadlineError, match="while the request ran"):
                asyncio.run(ask())
            fake.gate.set()
        assert serving.statistics.answered == 3 and serving.statistics.late == 2

    def test_a_cancelled_request_never_runs(self, fake):
        with engine(fake) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            future = serving.submit([2])

            async def ask_and_cancel():
                task = asyncio.create_task(serving.infer([3]))
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return task.cancelled()

            assert asyncio.run(ask_and_cancel())
            assert future.cancel()
            with pytest.raises(CancelledError):
                future.result(0)
            fake.gate.set()
            serving.infer_sync([4])
        assert {s[0] for s in fake.seen} == {1, 4} and serving.statistics.cancelled == 2

    def test_a_full_queue_refuses(self, fake):
        with engine(fake, max_queue=2) as serving:
            blocked(fake)
            running = serving.submit([1])
            until_running(fake)
            waiting = [serving.submit([2]), serving.submit([3])]
            with pytest.raises(OverloadError, match="max_queue"):
                serving.submit([4])
            fake.gate.set()
            assert all(f.result(60) is not None for f in (running, *waiting))
        assert serving.statistics.rejected == 1

    def test_higher_priorities_go_first(self, fake):
        with engine(fake, policy="nobatch") as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            futures = [serving.submit([i], priority=i) for i in (2, 3, 4)]
            fake.gate.set()
            for future in futures:
                future.result(60)
        assert [s[0] for s in fake.seen] == [1, 4, 3, 2]

    def test_nobody_is_passed_over_for_longer_than_is_allowed(self, fake):
        fake.seconds = 0.005
        with engine(fake, policy="nobatch", max_wait_s=0.05, max_queue=1000) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            serving.submit([2])
            urgent = [serving.submit([3, i], priority=9) for i in range(60)]  # 0.3 s of work
            fake.gate.set()
            for future in urgent:
                future.result(60)
        place = [s[0] for s in fake.seen].index(2)
        assert place < 40

    def test_a_lazy_engine_waits_for_more(self, fake):
        with engine(fake, trigger=Lazy(timeout_s=600.0), max_batch=4) as serving:
            futures = [serving.submit([i]) for i in range(4)]
            for future in futures:
                future.result(60)
        assert [len(b) for b in fake.batches] == [4]


class TestLife:
    def test_a_callback_may_close_the_engine(self, fake):
        serving = engine(fake).start()
        future = serving.submit([1])
        closed = threading.Event()
        future.add_done_callback(lambda _: (serving.close(), closed.set()))
        assert closed.wait(60)
        with pytest.raises(EngineError):
            serving.submit([2])

    def test_callbacks_of_two_executors_may_close_it(self, fakes):
        models = [fakes(), fakes()]
        for model in models:
            blocked(model)
        serving = engine(models, max_batch=1).start()
        closed = [threading.Event(), threading.Event()]
        for i, event in enumerate(closed):
            future = serving.submit([i])
            future.add_done_callback(lambda _, event=event: (serving.close(), event.set()))
        for model in models:
            until_running(model)
        for model in models:
            model.gate.set()
        assert all(event.wait(60) for event in closed)
        serving.close()

    def test_a_callback_may_not_wait_for_another_answer(self, fake):
        caught = []

        def ask(_):
            try:
                serving.infer_sync([2])
            except EngineError as error:
                caught.append(str(error))

        with engine(fake) as serving:
            blocked(fake)
            serving.submit([1]).add_done_callback(ask)
            fake.gate.set()
        assert "from a future's callback" in caught[0]

    def test_old_requests_are_seen_behind_many_important_ones(self, fake):
        with engine(fake, policy="nobatch", max_wait_s=0.01) as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            old = serving.submit([2])
            urgent = [serving.submit([3, i], priority=1) for i in range(400)]
            time.sleep(0.02)
            fake.gate.set()
            for future in (old, *urgent):
                future.result(20)
        assert fake.seen[1] == (2,)

    def test_a_lazy_engine_that_waits_for_ever_still_drains(self, fake):
        serving = engine(fake, trigger=Lazy(timeout_s=float("inf"))).start()
        future = serving.submit([1])
        time.sleep(0.05)
        assert not future.done()
        serving.close()
        assert future.result(0).tolist() == [1, 1]

    def test_batches_may_be_larger_than_what_is_usually_planned(self, fake):
        with engine(fake, max_batch=400, policy="naive") as serving:
            blocked(fake)
            serving.submit([1])
            until_running(fake)
            futures = [serving.submit([2, i]) for i in range(400)]
            fake.gate.set()
            for future in futures:
                future.result(60)
        assert [len(b) for b in fake.batches] == [1, 400]

    def test_a_cost_may_be_a_plain_function(self, fake):
        with engine(fake, cost=lambda lengths: 1e-3 + 1e-5 * sum(lengths), cache=0) as serving:
            found = answers_to(serving, fake, [[i, i] for i in range(12)])
        assert [answer[0] for answer in found] == [2 * i for i in range(12)]

    def test_drain_answers_all_that_waits(self, fake):
        serving = engine(fake).start()
        blocked(fake)
        futures = [serving.submit([i]) for i in range(20)]
        closing = threading.Thread(target=serving.close)
        closing.start()
        fake.gate.set()
        closing.join(60)
        assert [f.result(0)[0] for f in futures] == list(range(20))
        with pytest.raises(EngineError, match="the engine is closed"):
            serving.submit([1])
        serving.close()

    def test_without_drain_what_waits_is_told(self, fake):
        serving = engine(fake).start()
        blocked(fake)
        running = serving.submit([1])
        until_running(fake)
        waiting = serving.submit([2])
        closing = threading.Thread(target=serving.close, kwargs={"drain": False})
        closing.start()
        with pytest.raises(EngineError, match="not answered: the engine is closed"):
            waiting.result(60)
        fake.gate.set()
        closing.join(60)
        assert running.result(0).tolist() == [1, 1]

    def test_an_error_in_the_block_does_not_wait_for_the_queue(self, fake):
        with pytest.raises(KeyError), engine(fake) as serving:
            future = serving.submit([1])
            raise KeyError
        assert future.done()

    def test_before_and_after(self, fake):
        serving = engine(fake)
        for use in (lambda: serving.submit([1]), lambda: serving.cost):
            with pytest.raises(EngineError, match="does not run: use `with Engine"):
                use()
        with serving, pytest.raises(EngineError, match="started before"):
            serving.start()
        engine(fake).close()

    def test_a_cost_that_is_not_known_is_measured_first(self, fake):
        fake.cost = None
        with engine(fake) as serving:
            serving.infer_sync([1])
        assert fake.measured == 1

    def test_the_cost_follows_live_batches(self, fake):
        fake.seconds = 0.01
        with engine(fake, cache=0) as serving:
            for i in range(30):
                serving.infer_sync([i])
            assert serving.cost([1]) > 1.5 * serving.cost.base([1])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "best"}, "no scheduling policy 'best'"),
            ({"trigger": "never"}, "no trigger 'never'"),
            ({"max_batch": 0}, "max_batch"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_queue": True}, "max_queue"),
            ({"max_wait_s": -1.0}, "max_wait_s"),
            ({"cache": -1}, "bytes"),
            ({"output": "other"}, "no output"),
        ],
    )
    def test_options_are_checked(self, fake, options, message):
        with pytest.raises(InputError, match=message):
            engine(fake, **options)

    def test_models_are_checked(self, fake, fakes):
        with pytest.raises(InputError, match="needs a model"):
            Engine([])
        with pytest.raises(InputError, match="same model twice"):
            Engine([fake, fake])
        other = fakes()
        other.fingerprint = "another file"
        with pytest.raises(InputError, match=r"must be of one artifact.*load the same file once for each"):
            Engine([fake, other])


class Storm:
    """Producers that ask for anything, cancel, hurry and repeat themselves; and what became of every request."""

    def __init__(self, serving, seed: int):
        self.serving, self.seed = serving, seed
        self.asked: list[tuple[list[int], object]] = []
        self.settled: Counter[int] = Counter()
        self.lock = threading.Lock()

    def produce(self, number: int, requests: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        for _ in range(requests):
            ids = [rng.randrange(600) for _ in range(rng.choice((1, 2, 5, 40)))]
            if rng.random() < 0.3:
                ids = [rng.randrange(30)]  # often the same
            if rng.random() < 0.02:
                ids.append(GUILTY)
            future = self._submit(ids, rng.choice((None, None, None, 0.0005, 0.02, 5.0)))
            if rng.random() < 0.05:
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.002)
                future.cancel()

    def _submit(self, ids, timeout_s):
        while True:
            try:
                future = self.serving.submit(ids, timeout_s=timeout_s)
                break
            except OverloadError:
                time.sleep(0.001)
        with self.lock:
            self.asked.append((ids, future))
            number = len(self.asked)
        future.add_done_callback(lambda _: self._note(number))
        return future

    def _note(self, number: int) -> None:
        with self.lock:
            self.settled[number] += 1

    def check(self, right) -> Counter:
        assert sorted(self.settled) == list(range(1, len(self.asked) + 1))  # none lost
        assert set(self.settled.values()) == {1}  # none answered twice
        outcomes: Counter[str] = Counter()
        for ids, future in self.asked:
            if future.cancelled():
                outcomes["cancelled"] += 1
                continue
            error = future.exception(0)
            if error is None:
                assert GUILTY not in ids
                np.testing.assert_array_equal(future.result(0), right(ids))
                outcomes["answered"] += 1
            elif isinstance(error, DeadlineError):
                outcomes["expired"] += 1
            else:
                assert GUILTY in ids or "by chance" in str(error), error
                outcomes["failed"] += 1
        return outcomes


@pytest.mark.parametrize("replicas", [1, 3])
def test_ten_thousand_requests_from_64_producers(fakes, replicas):
    """5 % cancellations, deadlines, a guilty one in fifty, batches that fail by chance, a queue that is often full."""
    models = [fakes() for _ in range(replicas)]
    chance = random.Random(5)
    for model in models:
        model.seconds = 0.0002
        model.fail = lambda: TurboError("by chance") if chance.random() < 0.03 else None
    per_producer = 10_000 // 64 + 1 if replicas == 1 else 30
    with engine(models, max_queue=200, cache=4096, max_wait_s=0.5) as serving:
        storm = Storm(serving, replicas)
        threads = [threading.Thread(target=storm.produce, args=(i, per_producer)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    outcomes = storm.check(fakes.right)
    found = serving.statistics
    assert found.submitted == len(storm.asked) == 64 * per_producer and found.pending == 0
    assert {name: getattr(found, name) for name in outcomes} == dict(outcomes)
    assert min(outcomes[name] for name in ("answered", "cancelled", "failed", "expired")) > 0
    ran = Counter(s for model in models for s in model.seen)
    dropped = [tuple(ids) for ids, f in storm.asked if f.cancelled() or isinstance(f.exception(0), DeadlineError)]
    times = Counter(tuple(ids) for ids, _ in storm.asked)
    only = [ids for ids in dropped if times[ids] == 1]
    assert only and not any(ran[ids] for ids in only)  # nobody's request never reaches the device


class TestRealModels:
    def test_answers_are_those_of_run(self, served, random_requests):
        model = served("bert").compiled
        requests = [ids for many in random_requests(8, seed=3) for ids in many]
        alone = [model.run([ids])[0] for ids in requests]
        with engine(model, cost=LINEAR) as serving:
            futures = [serving.submit(ids) for ids in requests]
            for future, right in zip(futures, alone, strict=True):
                np.testing.assert_allclose(future.result(30), right, atol=1e-5)
        assert serving.statistics.batches < len(requests)

    @pytest.mark.parametrize("name", ["mean", "answers", "padded"])
    def test_other_outputs_and_layouts(self, served, name):
        model = served(name).compiled
        requests = [list(range(1, n)) for n in (5, 9, 3)]
        with engine(model, cost=LINEAR) as serving:
            found = [f.result(30) for f in [serving.submit(ids) for ids in requests]]
        for one, right in zip(found, model.run(requests), strict=True):
            if name == "answers":
                assert list(one) == list(right)
                one, right = one[0], right[0]
            np.testing.assert_allclose(one, right, atol=1e-5)
        waste = serving.statistics.padding_waste
        assert 0 <= waste < 0.7

    def test_the_interpreter_is_free_while_kernels_run(self, served):
        """Another thread counts on while the engine's thread is in native code."""
        model = served("bert").compiled
        counted, during = [0], []
        function = model._executor.function
        stop = threading.Event()

        def noted(*args):
            before = counted[0]
            result = function(*args)
            during.append(counted[0] - before)
            return result

        def count():
            while not stop.is_set():
                counted[0] += 1

        counter = threading.Thread(target=count)
        with engine(model, cost=LINEAR, cache=0) as serving:
            counter.start()
            model._executor._main = noted
            try:
                for future in [serving.submit([i % 101] * 60 + [i // 101] * 4) for i in range(1000)]:
                    future.result(30)
            finally:
                model._executor._main = function
                stop.set()
                counter.join()
        assert sum(during) > 1000  # none at all if kernels held the interpreter

    def test_a_cost_is_measured_within_the_memory_budget(self, served):
        model = served("bert").compiled
        before = model._artifact
        try:
            model.memory_budget = model.peak_bytes([20])
            assert model.measure_cost(budget_s=0.2).points > 2
        finally:
            model.memory_budget, model._artifact = None, before

    def test_a_cost_is_measured_kept_and_found_again(self, served, tmp_path):
        import turbo_tvm

        model = served("bert").compiled
        said: list[str] = []
        before = model._artifact
        model._artifact = replace(
            before, manifest=replace(before.manifest, members={})
        )  # as it was before it was saved
        unsaved = model.fingerprint
        try:
            spec = model.measure_cost(budget_s=0.3, say=said.append)
            assert spec.kind in ("packed", "padded") and said
            assert model.cost is not None and model.cost([10]) > 0
            model.save(tmp_path / "bert.turbo")
        finally:
            model._artifact = before  # other tests use the model too
        again = turbo_tvm.load(tmp_path / "bert.turbo", threads=model.threads)
        assert again.cost is not None and again.cost.spec == spec
        assert again.fingerprint == turbo_tvm.load(tmp_path / "bert.turbo").fingerprint != unsaved


class Linear:
    def __call__(self, lengths):
        return 1e-3 + 1e-5 * sum(lengths)

    def batches(self, counts, tokens, squares, longest):
        return 1e-3 + 1e-5 * tokens


LINEAR = Linear()
