"""The profiler: what it counts and adds up, and the arithmetic of the roofline. Nothing here depends on time."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from turbo_tvm.errors import InputError, TurboError
from turbo_tvm.profiling import profiler
from turbo_tvm.profiling.roofline import KernelProfile, MachineLimits, Work, floor
from turbo_tvm.runtime.executor import ForeignExecutor
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.runtime.random_requests import random_sequences

LENGTHS = [5, 37, 64]
LIMITS = MachineLimits("cpu", 1, "0", 1e9, 2e9, 1e8, 2e8, 1e9, 1 << 20)


@pytest.fixture(scope="module")
def report(served):
    return served("bert").compiled.profile(LENGTHS, rounds=3, limits=LIMITS)


def test_calls_are_the_manifests(served, report):
    wanted = {spec.name: (spec.calls, spec.family) for spec in served("bert").compiled.manifest.kernels}
    assert {k.name: (k.calls, k.family) for k in report.kernels} == wanted


def test_a_batch_in_groups_calls_the_kernels_for_each(served, report, monkeypatch):
    compiled = served("bert").compiled
    monkeypatch.setattr(compiled, "max_batch_tokens", 64)  # 5 + 37, then 64
    in_groups = {k.name: k for k in compiled.profile(LENGTHS, rounds=1).kernels}
    for kernel in report.kernels:
        other = in_groups[kernel.name]
        assert (other.calls, other.work.flops) == (2 * kernel.calls, kernel.work.flops)
        if kernel.family == "linear":
            assert other.work.bytes_weights == 2 * kernel.work.bytes_weights


def test_flops_are_those_of_the_lengths(served, report):
    tokens, pairs = sum(LENGTHS), sum(n * n for n in LENGTHS)
    kernels = served("bert").compiled.manifest.kernels
    wanted = sum(k.calls * (k.flops_per_token * tokens + k.flops_per_pair * pairs) for k in kernels)
    assert report.flops == pytest.approx(wanted) and wanted > 0


def test_bytes(served, report):
    """A product reads its packed weights, and moves rows of whole tiles in and out."""
    manifest = served("bert").compiled.manifest
    spec = next(k for k in manifest.kernels if k.shapes == "32 -> 96")
    work = next(k for k in report.kernels if k.name == spec.name).work
    rows = -(-sum(LENGTHS) // manifest.row_tile) * manifest.row_tile
    assert work.bytes_weights == spec.calls * spec.bytes_weights
    assert work.bytes_activations == spec.calls * rows * (32 + 96) * 4


def test_an_embedding_in_bf16_reads_half_as_much(served):
    manifest = served("bert").compiled.manifest
    spec = replace(next(k for k in manifest.kernels if k.family == "embedding"), bytes_weights=1 << 30)
    made = [
        profiler._work(spec, replace(manifest, precision=precision), LENGTHS, [(1,)], 0, 0.0).bytes_weights
        for precision in ("fp32", "bf16")
    ]
    assert made == [4 * 3 * 32 * sum(LENGTHS), 2 * 3 * 32 * sum(LENGTHS)]


def test_an_embedding_reads_rows_of_its_tables(served, report):
    spec = next(k for k in served("bert").compiled.manifest.kernels if k.family == "embedding")
    work = next(k for k in report.kernels if k.family == "embedding").work
    assert work.bytes_weights == min(spec.bytes_weights, 4 * 3 * 32 * sum(LENGTHS))


def test_parts_add_up(report):
    parts = [*(k.seconds for k in report.kernels), report.vm_s, report.python_s]
    assert sum(map(report.share, parts)) == pytest.approx(1)
    assert report.total_s == pytest.approx(sum(parts))
    assert report.tokens_per_s == pytest.approx(sum(LENGTHS) / statistics.median(report.samples["run"]))


def test_every_round_has_a_sample(report):
    assert set(map(len, report.samples.values())) == {3} == {len(k.samples) for k in report.kernels}
    for i, total in enumerate(report.samples["kernels"]):
        assert total == pytest.approx(sum(k.samples[i] for k in report.kernels))


def test_fractions_are_floor_over_time(report):
    for kernel in report.kernels:
        least, bound = floor(kernel.name, kernel.work, LIMITS)
        assert (kernel.floor_s, kernel.bound) == (least, bound)
        if kernel.seconds:
            assert kernel.fraction == pytest.approx(least / kernel.seconds)


def test_without_limits_there_are_no_floors(served):
    report = served("bert").compiled.profile([3], rounds=1)
    assert report.floor_s is None and all(k.floor_s is k.bound is k.fraction is None for k in report.kernels)
    assert report.flops > 0


@pytest.mark.parametrize(
    ("name", "work", "wanted"),
    [
        ("linear_8x8", Work(2e9, 1e8, 0, 1e9), (2.0, "compute")),
        ("linear_8x8", Work(2e9, 1e9, 0, 1e9), (5.0, "memory")),
        ("linear_8x8", Work(0, 1e6, 0, 1e6), (1e-3, "memory")),  # the weights stay in the cache
        ("linear_8x8", Work(0, 2e8, 1e6, 1e9), (1.001, "memory")),  # the activations do
        ("linear_8x8_bf16", Work(2e9, 0, 0, 0), (1.0, "compute")),
        ("linear_8x8_bf16_out_fp32_amx", Work(2e9, 0, 0, 0), (1.0, "compute")),
        ("attention_2x16_merged_max64_bf16", Work(2e9, 0, 0, 0), (1.0, "compute")),
        ("pool", Work(0, 0, 0, 0), (None, None)),
    ],
)
def test_floor(name, work, wanted):
    least, bound = floor(name, work, LIMITS)
    assert bound == wanted[1]
    assert least == (None if wanted[0] is None else pytest.approx(wanted[0]))


def test_a_kernel_of_no_time_has_no_rates():
    kernel = KernelProfile("k", "linear", 1, 0.0, (0.0,), Work(1, 1, 1, 1), 1.0, "compute")
    assert kernel.flops_per_s is kernel.bytes_per_s is kernel.fraction is None


def test_tvms_own_kernels_have_names_and_no_figures(served):
    compiled = served("padded").compiled
    report = compiled.profile([3, 9], rounds=1, limits=LIMITS)
    ours = {spec.name: spec for spec in compiled.manifest.kernels}
    listed = {k.name for k in report.kernels}
    assert set(ours) <= listed and len(listed) > len(ours)
    for kernel in report.kernels:
        if kernel.name not in ours:
            assert (kernel.family, kernel.work, kernel.floor_s) == (None, None, None)
        else:
            assert kernel.work.flops == kernel.calls * ours[kernel.name].flops_per_token * 2 * 9
    assert not any(k.name.startswith(("vm.", "shape_func")) for k in report.kernels)


def test_answers_are_the_same_afterwards(served):
    compiled = served("bert").compiled
    ids = random_sequences([7, 2], compiled.manifest.request_limits, 1)
    before = compiled.run(ids)
    compiled.profile([40], rounds=1)
    for a, b in zip(before, compiled.run(ids), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_hooked_run_answers_the_same(served):
    """The hook runs the kernels itself: the model's answers must not notice."""
    compiled = served("bert").compiled
    ids = random_sequences([7, 30], compiled.manifest.request_limits, 1)
    wanted, answers = compiled.run(ids), []
    profiler.profile(lambda s: answers.append(compiled.run(s)), compiled._executor, [7, 30], rounds=1, seed=1)
    assert len(answers) == 5
    for answer in answers:
        for a, b in zip(answer, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ids_are_valid_and_seeded(served):
    limits = served("bert").compiled.manifest.request_limits
    first, again, other = (random_sequences([64, 3], limits, seed) for seed in (0, 0, 1))
    assert [len(ids) for ids in first] == [64, 3]
    assert all(ids.min() >= 0 and ids.max() < limits.vocab_size for ids in first)
    assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("lengths", [[], [0], [4, -1]])
def test_lengths_that_are_none(served, lengths):
    with pytest.raises(InputError, match="lengths are whole numbers of at least 1"):
        served("bert").compiled.profile(lengths)


def test_a_length_beyond_the_model(served):
    with pytest.raises(InputError, match="a sequence of 65 tokens is too long: the model allows 64"):
        served("bert").compiled.profile([3, 65])


def test_no_rounds(served):
    with pytest.raises(InputError, match="at least one round is needed, not 0"):
        served("bert").compiled.profile([3], rounds=0)


def test_a_model_for_another_machine(served):
    foreign = CompiledModel(served("bert").compiled._artifact, ForeignExecutor("this CPU lacks amx"))
    with pytest.raises(TurboError, match=r"lacks amx .*can be saved here"):
        foreign.profile([3])
