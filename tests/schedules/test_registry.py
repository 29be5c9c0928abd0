"""Which kernel implements an operator on a device, what a family is called, and why there is none."""

from __future__ import annotations

import importlib
import inspect

import pytest
import sized_operators as sized
from sample_operators import SAMPLES

from turbo_tvm.ops import VOCABULARY, Operator, PackBias, PackDistances, PackWeight, Softmax, formats
from turbo_tvm.schedules.common.space import Space
from turbo_tvm.schedules.cpu import linear
from turbo_tvm.schedules.cpu.tiles import AMX, AVX2, AVX512, BASELINE, NEON
from turbo_tvm.schedules.cuda.attention import MAX_HEAD_DIM
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES
from turbo_tvm.schedules.registry import FAMILIES, candidates, family_of, named, refusal

FP32, BF16 = formats.FP32.storage, formats.BF16.storage
NAMES = [family.name for family in FAMILIES]
MERGED = [(192, 0), (192, 64), (192, 128)]  # columns of q, k and v
NORMALISED = "on a GPU a product's rows are normalised by a kernel of their own"
DISENTANGLED = "disentangled attention, which the GPU's kernel does not know"


def nothing(name: str) -> str:
    return f"{name}, which the target has no kernel for"


def test_every_operator_of_the_vocabulary_has_a_sample():
    assert {type(operator) for operator in SAMPLES} == set(VOCABULARY)


@pytest.mark.parametrize("tiles", [AVX512, AMX, AVX2, NEON, BASELINE], ids=str)
def test_every_operator_has_a_family_on_a_cpu_or_a_reason(tiles):
    for operator in SAMPLES:
        expected = nothing("softmax") if isinstance(operator, Softmax) else ""
        assert refusal(operator, tiles) == expected
        check_family(operator, tiles, "cpu", expected)


def test_every_operator_has_a_family_on_a_gpu_or_a_reason():
    reasons = set()
    for operator in SAMPLES:
        reason = refusal(operator, CUDA_TILES)
        check_family(operator, CUDA_TILES, "cuda", reason)
        reasons.add(reason)
    assert reasons == {"", NORMALISED, DISENTANGLED, nothing("tile_rows"), nothing("untile_rows")}


def check_family(operator: Operator, tiles, device: str, reason: str) -> None:
    """Without a reason there is a family for that operator on the device, or on the CPU that compiles."""
    if reason:
        with pytest.raises(LookupError, match=f"no kernel for {operator.NAME}: {reason}"):
            family_of(operator, tiles)
        return
    family = family_of(operator, tiles)
    assert family.operator is type(operator) and family in candidates(type(operator), tiles)
    assert not family.refuses(operator, tiles)
    assert family.name.partition(".")[0] in (device, "common") or isinstance(operator, PackDistances)


@pytest.mark.parametrize(
    "operator,reason",
    [
        (sized.linear(CUDA_TILES, 8, 8, norm_eps=1e-5), NORMALISED),
        (sized.linear(CUDA_TILES, 8, 8, residual=True, activation="gelu"), ""),
        (sized.attention(CUDA_TILES, 2, 32, 16, columns=MERGED, position_bias=True), ""),
        (sized.attention(CUDA_TILES, 2, 32, 16, columns=MERGED, key_table=80), DISENTANGLED),
        (sized.attention(CUDA_TILES, 2, 32, 16, columns=MERGED, query_table=80), DISENTANGLED),
        (sized.attention(CUDA_TILES, 1, MAX_HEAD_DIM, 16, columns=[(MAX_HEAD_DIM, 0)] * 3), ""),
        (
            sized.attention(CUDA_TILES, 1, MAX_HEAD_DIM + 8, 16, columns=[(MAX_HEAD_DIM + 8, 0)] * 3),
            f"a head of {MAX_HEAD_DIM + 8} columns; the GPU's kernel takes {MAX_HEAD_DIM}",
        ),
        (sized.tile_rows(CUDA_TILES, 8), nothing("tile_rows")),
        (sized.softmax(CUDA_TILES, 8), ""),
    ],
    ids=lambda value: value.kernel_name() if isinstance(value, Operator) else "",
)
def test_what_a_gpu_refuses(operator, reason):
    assert refusal(operator, CUDA_TILES) == reason


def product(tiles, dtype: str, **more):
    return sized.linear(tiles, 64, 32, x=sized.rows(tiles, 64, dtype), **more)


def heads(tiles, dtype: str, out: str, **more):
    return sized.attention(tiles, 2, 32, 16, columns=MERGED, dtype=dtype, out=sized.rows(tiles, 64, out), **more)


@pytest.mark.parametrize(
    "tiles,operator,name",
    [
        (AMX, product(AMX, BF16), "linear_amx.linear"),
        (AMX, product(AMX, BF16, residual=True, norm_eps=1e-5, activation="gelu"), "linear_amx.linear"),
        (AMX, product(AMX, FP32), "linear.linear"),
        (AVX512, product(AVX512, BF16), "linear.linear"),
        (AMX, heads(AMX, BF16, BF16), "attention_amx.attention"),
        (AMX, heads(AMX, BF16, BF16, window=5), "attention_amx.attention"),
        (AMX, heads(AMX, BF16, BF16, position_bias=True), "attention.attention"),
        (AMX, heads(AMX, BF16, BF16, key_table=80), "attention.attention"),
        (AMX, heads(AMX, BF16, FP32), "attention.attention"),
        (AMX, heads(AMX, FP32, FP32), "attention.attention"),
        (AVX512, heads(AVX512, BF16, BF16), "attention.attention"),
    ],
)
def test_amx_is_preferred_where_it_fits(tiles, operator, name):
    assert family_of(operator, tiles).name == f"cpu.{name}"
    assert family_of(operator, tiles).suffix == ("amx" if "amx" in name else "")


@pytest.mark.parametrize("kind", [PackWeight, PackBias, PackDistances], ids=lambda kind: kind.NAME)
def test_weights_are_prepared_on_the_cpu_whatever_the_target(kind):
    on_cpu, on_gpu = (candidates(kind, tiles) for tiles in (AVX2, CUDA_TILES))
    assert on_cpu == on_gpu and len(on_cpu) == 1
    assert not on_gpu[0].name.startswith("cuda.")


def test_names_are_unique_and_name_their_schedules():
    assert len(set(NAMES)) == len(NAMES)
    for family in FAMILIES:
        module, _, schedule = family.name.rpartition(".")
        found = importlib.import_module(f"turbo_tvm.schedules.{module}")
        assert family.build is getattr(found, schedule)
        assert family.version == getattr(found, "VERSION", 0) and family.space is getattr(found, "space", None)
        assert named(family.name) is family


def test_kernels_of_two_families_have_two_names():
    """Where several implement an operator on a device, their suffixes differ."""
    keys = [(family.name.partition(".")[0], family.operator, family.suffix) for family in FAMILIES]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_schedule_takes_an_operator_tiles_and_variants(family):
    names = list(inspect.signature(family.build).parameters.values())
    assert [parameter.name.lstrip("_") for parameter in names[:3]] == ["operator", "tiles", "variants"]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in names[2:])
    assert (family.space is None) == (family.version == 0), "a space has a version"


@pytest.mark.parametrize(
    "name", ["", "linear.linear", "cpu.linear", "cpu.linear.space", "CPU.linear.linear", None, 1, []]
)
def test_other_names_are_refused(name):
    with pytest.raises(LookupError, match="there is no kernel family "):
        named(name)


def test_an_operator_that_nobody_implements():
    class Convolution(Operator):
        NAME = "convolution"

    operator = Convolution(out=sized.rows(AVX2, 8))
    for tiles in (AVX2, CUDA_TILES):
        assert candidates(Convolution, tiles) == [] and refusal(operator, tiles) == nothing("convolution")
        with pytest.raises(LookupError, match="no kernel for convolution: convolution, which the target has no"):
            family_of(operator, tiles)


def test_what_can_be_tuned():
    operator = product(AVX2, FP32)
    assert named("cpu.linear.linear").space_of(operator, AVX2) == linear.space(operator, AVX2)
    assert named("cpu.gate.gate").space_of(sized.gate(AVX2, 8, "gelu"), AVX2) == Space()
