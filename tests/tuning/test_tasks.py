"""Which kernels there are to tune, and in which batches they are measured."""

from __future__ import annotations

import pytest
import sized_operators as sized
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.errors import TuningError
from turbo_tvm.schedules.cpu import linear, tiles
from turbo_tvm.tuning.tasks import USUAL_LENGTHS, Bucket, buckets, tasks_of

ROWS = (16, 64, 256, 1024)
BOUNDS = (32, 128, 512, 2048)
LARGEST = 8192  # stands for all larger batches, and weighs nothing


def product(n: int) -> str:
    return KernelRecipe.of(sized.linear(tiles.AVX2, 8, n), tiles.AVX2).to_json()


def spec(name: str, n: int = 8, **more) -> KernelSpec:
    counts = {"calls": 2, "flops_per_token": 16.0 * n, "bytes_weights": 32 * n, "bytes_per_token": 4 * (8 + n)}
    return KernelSpec(name, "linear", **{**counts, "recipe": product(n), **more})


GATE = KernelRecipe.of(sized.gate(tiles.AVX2, 8, "gelu"), tiles.AVX2).to_json()
KERNELS = [
    spec("linear_8_8"),
    spec("linear_8_64", 64),
    spec("linear_8_32", 32, calls=12),
    spec("without_a_recipe", recipe=""),
    spec("never_called", calls=0),
    spec("gate_8", recipe=GATE),  # without knobs
    spec("of_sequences", flops_per_token=0.0),  # a row per sequence
]


def test_kernels_with_knobs_those_with_most_work_first():
    tasks = tasks_of(KERNELS)
    assert [task.kernel for task in tasks] == ["linear_8_32", "linear_8_64", "linear_8_8"]
    assert tasks[0].calls == 12 and tasks[0].recipe.to_json() == product(32)
    assert tasks[0].space == linear.space(sized.linear(tiles.AVX2, 8, 32), tiles.AVX2)


def test_kernels_by_a_part_of_their_names():
    assert [task.kernel for task in tasks_of(KERNELS, ["8_8", "8_64"])] == ["linear_8_64", "linear_8_8"]
    assert [task.kernel for task in tasks_of(KERNELS, ["32"])] == ["linear_8_32"]


def test_attention_counts_pairs_of_tokens():
    (task,) = tasks_of([spec("attention", flops_per_token=0.0, flops_per_pair=3.0)])
    assert task.flops([2, 5]) == 3.0 * (4 + 25)


def test_work_of_a_call():
    (task,) = tasks_of([spec("linear_8_8", flops_per_pair=1.0)])
    assert task.flops([2, 5]) == 128 * 7 + 29
    assert task.bytes([2, 5]) == 256 + 64 * 7


def test_nothing_to_tune_is_said():
    with pytest.raises(TuningError, match=r"nothing to tune called \['attention'\]; kernels with knobs: linear_8_8"):
        tasks_of(KERNELS[:1], ["attention"])
    with pytest.raises(TuningError, match="there is nothing to tune; kernels with knobs: none"):
        tasks_of(KERNELS[3:])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=20), st.integers(8, 600), st.integers(0, 3))
def test_buckets_of_any_lengths(lengths, max_length, seed):
    lengths = [*lengths, 5]
    made = buckets(lengths, max_length, seed)
    assert made == buckets(lengths, max_length, seed)
    bounds = [bucket.max_rows for bucket in made]
    assert bounds[-1] is None and bounds[:-1] == sorted(set(bounds[:-1]))
    assert sum(bucket.weight for bucket in made) == pytest.approx(1)
    assert (made[-1].rows, made[-1].weight) == (LARGEST, 0)
    assert all(b.weight > 0 and b.max_rows == dict(zip(ROWS, BOUNDS, strict=True))[b.rows] for b in made[:-1])
    for bucket in made:
        assert all(n in lengths and n <= max_length for n in bucket.lengths[:-1])
        assert 1 <= bucket.lengths[-1] <= max_length, "the last one may be cut"


def test_the_buckets_of_usual_lengths():
    made = buckets(USUAL_LENGTHS, 512)
    assert [(bucket.max_rows, bucket.rows) for bucket in made] == list(
        zip((*BOUNDS, None), (*ROWS, LARGEST), strict=True)
    )


def test_batches_without_requests_are_left_out():
    """At 512 tokens each, no batch is small; at one token, none is large."""

    def of(lengths):
        return [(bucket.max_rows, bucket.rows) for bucket in buckets(lengths, 512)]

    assert of([512]) == [(512, 256), (2048, 1024), (None, LARGEST)]
    assert of([1]) == [(32, 16), (None, LARGEST)]


def test_a_bucket_weighs_what_its_batches_are():
    """Of 30 tokens, in batches of 1, 4, 16 and 32: 30, 120, 480 and 960 rows."""
    assert [bucket.weight for bucket in buckets([30], 512)] == [*[0.25] * 4, 0]
    assert buckets([30], 512)[0] == Bucket(32, (16,), 0.25)


@pytest.mark.parametrize("lengths", [[], [0, -1], [65, 1000]])
def test_lengths_that_the_model_does_not_take(lengths):
    with pytest.raises(TuningError, match="is one that the model takes: 1 to 64 tokens"):
        buckets(lengths, 64)
