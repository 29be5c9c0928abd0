"""The matrix kernel in AMX tiles: its results, and its machine code for CPUs with AMX.

The instructions are this machine's where it has them, and functions of the same kind everywhere (`amx_emulation.cc`),
which also judge how they are used: shapes, order, what is read, what is left configured.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.schedules.common import weights
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import amx, linear_amx, tiles

EPS = 1e-5
FP32, BF16 = "float32", "uint16"
HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
GELU_BF16 = 8e-5  # what `gelu_bf16` may be off, times max(1, |x|)
GEOMETRY = tiles.AMX
R = GEOMETRY.row_tile

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(FP32)


def rows(width, dtype=BF16):
    return sized.rows(GEOMETRY, width, dtype)


def operator_of(k, n, **options):
    return sized.linear(GEOMETRY, k, n, **{"x": rows(k), **options})


@functools.cache
def kernel_of(k, n, variants=(), instructions=amx.LLVM, **options):
    return linear_amx.linear(operator_of(k, n, **options), GEOMETRY, variants, instructions)


def space(k, **options):
    return linear_amx.space(operator_of(k, 40, **options), GEOMETRY)


@functools.cache
def packing_of(k, n):
    return weights.pack_weight(sized.pack_weight(GEOMETRY, k, n, BF16), GEOMETRY)


def check_use(use, t, k, n, width):
    """What the emulation saw of a product with so many row tiles in rows of that width."""
    panels, steps = GEOMETRY.panels(n), -(-k // 32)
    assert not use.fault and not use.active
    heights = [min(32, t * R - row) for row in range(0, t * R, 32)]
    assert use.products == panels * steps * sum(4 if height > 16 else 2 for height in heights)
    assert use.x_bytes == (2 * ((t * R - 1) * width + k) if t else 0), "read beyond k or the last row"
    assert use.weight_bytes == (2 * panels * k * GEOMETRY.col_tile if t else 0)
    assert use.repeated == 0 or k < 32, "tiles were configured although their shapes stay"


@pytest.fixture
def multiply(run_kernel, tile_machine):
    """`multiply(x, w, bias, *others, width, **options)`: the kernel's output; fails if tiles were misused."""
    instructions, report = tile_machine.instructions, tile_machine.report

    def multiply(x, w, bias, *others, width, out=FP32, before=None, **options):
        (n, k), t, panels = w.shape, len(x), GEOMETRY.panels(len(w))
        packed = run_kernel(packing_of(k, n), [w], (panels, k // 2, GEOMETRY.col_tile), dtype="int32")
        padded = np.zeros(panels * GEOMETRY.col_tile, FP32)
        padded[:n] = bias
        formats = {"x": rows(x.shape[-1]), "out": rows(width, out)}
        given = {name: value for name, value in options.items() if value}
        kernel = kernel_of(instructions=instructions, k=k, n=n, **formats, **given)
        if report is not None:
            report()
        result = run_kernel(kernel, [x, packed, padded, *others], (t, R, width), dtype=out, out=before)
        if report is not None:
            check_use(report(), t, k, n, x.shape[-1])
        return result

    return multiply


@pytest.fixture
def check(multiply, stored, loaded):
    """`check(t, k, n, ...)`: the kernel on so many row tiles against float64, as in `test_linear.py`."""

    def check(t, k, n, activation=None, residual=False, norm=False, extra=FP32, out=FP32, wider=(0, 0, 0), variants=()):
        x = stored(draw(1, t, R, k), BF16, k + wider[0])
        extra_rows = stored(draw(2, t, R, n), extra, n + wider[1])
        w = loaded(stored(draw(3, n, k) / np.float32(math.sqrt(k)), BF16), k).astype(FP32)
        bias, gamma, beta = draw(4, n), draw(5, n), draw(6, n)
        others = [extra_rows] * residual + [gamma, beta] * norm
        options = {"activation": activation, "norm_eps": EPS if norm else None}
        options["residual"] = rows(n + wider[1], extra) if residual else None
        options["variants"] = variants
        got = loaded(multiply(x, w, bias, *others, width=n + wider[2], out=out, **options), n)

        products = loaded(x, k) @ w.T.astype("float64") + bias
        wanted = ACTIVATIONS[activation](products) + loaded(extra_rows, n) * residual
        bound = 1e-5 * math.sqrt(max(1, k / 100)) + 2e-5 * np.abs(wanted)
        if out == BF16:
            bound += HALF_ULP * np.abs(wanted)
            bound += 1.01 * GELU_BF16 * np.maximum(1, np.abs(products)) * (activation == "gelu")
        if norm:
            mean, deviation = wanted.mean(-1, keepdims=True), np.sqrt(wanted.var(-1, keepdims=True) + EPS)
            wanted = (wanted - mean) / deviation * gamma + beta
            if out == BF16:
                bound = 3 * bound.max(-1, keepdims=True) / deviation * np.abs(gamma) + HALF_ULP * np.abs(wanted)
            else:
                bound = 1e-5 * math.sqrt(max(1, k / 100)) + 2e-5 * np.abs(wanted)
        assert (np.abs(got - wanted) - bound).max() <= 0

    return check


# around a tile of 16 and of 32 rows, and around blocks of 384
@pytest.mark.parametrize("t", [*range(1, 18), 47, 48, 49, 57, 95, 96, 97, 193])
def test_row_counts(check, t):
    check(t, 96, 96)
    check(t, 72, 40)


# no whole step, one, two and three, after which 32, 16 and 11 rows of the tile before are finished; more than it has
# rows; with and without a rest
@pytest.mark.parametrize("k", [2, 16, 30, 32, 34, 62, 64, 66, 100, 126, 1056, 1100])
def test_every_number_of_steps_in_runs_of_many_tiles(check, k):
    """With 24 panels a run has one or two tiles, or four or five, a lower one among them, or 16 of two blocks."""
    for t in (3, *range(17, 25), 99):
        check(t, k, 745, residual=True)


def test_blocks_of_one_tile(check):
    check(17, 40, 100, wider=(13000, 0, 0))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 100])
def test_columns_that_do_not_fill_the_last_panel(check, n):
    check(5, 70, n, residual=True)
    check(97, 70, n, residual=True)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(check, activation):
    check(75, 48, 36, activation=activation)


@pytest.mark.parametrize("n,residual,activation", [(96, True, None), (100, False, "gelu"), (7, True, "relu")])
def test_norm(check, n, residual, activation):
    check(75, 36, n, activation=activation, residual=residual, norm=True)


@pytest.mark.parametrize("n", [64, 70])
@pytest.mark.parametrize("wider", [(16, 0, 0), (0, 16, 0), (0, 0, 16), (2, 4, 6), (32, 32, 32)], ids=str)
def test_wide_rows(check, wider, n):
    check(5, 40, n, residual=True, norm=n == 70, wider=wider)
    check(97, 40, n, residual=True, norm=n == 70, wider=wider)


@pytest.mark.parametrize("extra", [FP32, BF16])
@pytest.mark.parametrize("out", [FP32, BF16])
@pytest.mark.parametrize("n", [32, 35])
def test_formats_of_residual_and_output(check, extra, out, n):
    check(75, 48, n, activation="gelu", residual=True, norm=n == 35, extra=extra, out=out)


def test_the_sizes_of_a_bert_base_layer(check):
    check(9, 768, 3072, activation="gelu", out=BF16, wider=(0, 0, 32))
    check(9, 3072, 768, residual=True, norm=True, extra=BF16, out=BF16, wider=(32, 0, 0))


@pytest.mark.parametrize("k,n", [(4, 32), (68, 70)])
def test_every_row_tile_is_computed_once(multiply, stored, k, n):
    """The residual is the output itself: what is computed twice is added twice. Whole numbers, so sums are exact."""
    rng = np.random.default_rng(0)
    w = rng.integers(-9, 10, (n, k)).astype(FP32)
    for t in (*range(1, 20), *range(47, 51), *range(95, 99), 150):
        x = rng.integers(-9, 10, (t, R, k)).astype(FP32)
        before = rng.integers(-9, 10, (t, R, n)).astype(FP32)
        rows = stored(x, BF16)
        after = multiply(rows, w, np.zeros(n), before, width=n, residual=True, before=before)
        np.testing.assert_array_equal(after, before + x @ w.T, f"{t} row tiles")


@pytest.mark.parametrize("t", [1, 3, 4, 9, 50])
def test_surplus_rows_do_not_touch_the_others(multiply, stored, t):
    x, w, bias = draw(1, t, R, 72), draw(2, 40, 72), draw(3, 40)
    rows = []
    for surplus in (0, 3e38, np.inf, np.nan):
        x[-1, 1:] = surplus
        rows.append(multiply(stored(x, BF16), w, bias, width=40).reshape(-1, 40)[: (t - 1) * R + 1])
    for other in rows[1:]:
        np.testing.assert_array_equal(other, rows[0])


def test_a_row_does_not_depend_on_its_batch(multiply, stored):
    x, w, bias = stored(draw(1, 50, R, 72), BF16), draw(2, 40, 72), draw(3, 40)
    together = multiply(x, w, bias, width=40)
    for t in range(1, 10):  # tiles of other heights, at other places of a run
        np.testing.assert_array_equal(together[11 : 11 + t], multiply(x[11 : 11 + t], w, bias, width=40))


def test_no_row_is_none(multiply):
    w = np.zeros((40, 72), FP32)
    assert multiply(np.zeros((0, R, 72), BF16), w, np.zeros(40), width=40).size == 0


KNOBS = space(100).knobs


def end_of(place, names=tuple(knob.name for knob in KNOBS)):
    """The setting with the first (0) or last (-1) values of these knobs."""
    return tuple((knob.name, knob.values[place]) for knob in KNOBS if knob.name in names)


def by_size(*names):
    """The smallest values for up to 44 rows, the largest for up to 200, the defaults beyond."""
    return Variant(end_of(0, *names), 11 * R), Variant(end_of(-1, *names), 50 * R), Variant()


# around the bounds, and in each variant tiles of all heights; runs of several tasks, one tile in a block and many
SIZES = (1, 3, 4, 5, 10, 11, 12, 17, 49, 50, 51, 99)


@pytest.mark.parametrize("place", [0, -1], ids=["smallest", "largest"])
def test_all_knobs_at_their_ends(check, place):
    for t in SIZES:
        check(t, 100, 745, residual=True, out=BF16, variants=(Variant(end_of(place)),))


def test_variants_by_rows(check):
    for t in SIZES:
        check(t, 100, 745, residual=True, out=BF16, variants=by_size())


PACKED, BY_INTEGERS = (Variant((("pack", 1),)),), (Variant((("pack", 0),)),)


def test_both_conversions_to_bf16_give_the_same(multiply, stored):
    x, w, bias = stored(draw(1, 9, R, 72), BF16), draw(2, 64, 72), draw(3, 64)
    got = [multiply(x, w, bias, width=64, out=BF16, variants=variants) for variants in (PACKED, BY_INTEGERS)]
    np.testing.assert_array_equal(*got)


def test_an_output_in_fp32_is_not_packed():
    packed, plain = (kernel_of(k=72, n=64, variants=v) for v in (PACKED, BY_INTEGERS))
    tvm.ir.assert_structural_equal(packed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", [knob.name for knob in KNOBS])
def test_a_knob_at_its_ends(check, name):
    for t in SIZES:
        check(t, 100, 745, activation="gelu", residual=True, norm=True, out=BF16, variants=by_size([name]))
        check(t, 18, 40, residual=True, out=BF16, variants=by_size([name]))
    for place in (0, -1):
        for t in (1, 5, 49):
            check(t, 64, 70, out=BF16, variants=(Variant(end_of(place, [name])),))


def test_the_default_variant_is_the_kernel_by_itself():
    options = {"k": 96, "n": 40, "out": rows(40)}
    plain = kernel_of(**options)
    for setting in ((), tuple(space(96).default.items())):
        tuned = kernel_of(**options, variants=(Variant(setting),))
        tvm.ir.assert_structural_equal(tuned, plain)


@pytest.mark.parametrize("width,usual", [(64, 12), (768, 12), (3072, 4), (13000, 1)])
def test_a_block_takes_so_much_of_the_cache_by_itself(width, usual):
    assert space(64, x=rows(width)).default["block_tiles"] == usual


@pytest.mark.parametrize("setting", [("group", 4), ("block_tiles", 5), ("near", -1), ("pack", 2)])
def test_settings_that_do_not_exist_are_refused(setting):
    with pytest.raises(ValueError, match=r"there is no knob 'group'|knob (block_tiles|near|pack) cannot be"):
        kernel_of(k=64, n=32, variants=(Variant((setting,)),))


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit AMX"):
        linear_amx.linear(sized.linear(tiles.AVX2, 8, 8, x=sized.rows(tiles.AVX2, 8, BF16)), tiles.AVX2)


def test_the_same_parameters_as_without_amx():
    def names(**options):
        return [p.name for p in kernel_of(k=8, n=32, **options).params]

    assert names() == ["source", "weight", "bias", "result"]
    assert names(residual=True, norm_eps=EPS)[3:6] == ["residual_rows", "gamma", "beta"]


@pytest.fixture(scope="module")
def run_code(assembly):
    """`run_code(k, n)`: the text of the function that works through a run of tiles, on a CPU with AMX."""

    def get(k, n, mcpu="sapphirerapids"):
        kernel = kernel_of(k=k, n=n, activation="gelu", norm_eps=EPS)
        text = assembly(kernel, {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu})
        assert "vdpbf16ps" not in text
        assert not re.search(r"\bturbo_\w+@", text), "a function that was not imported"
        (function,) = [part for part in re.split(r"\n\.Lfunc_end\d+:", text) if "ldtilecfg" in part]
        return function[function.index("parallel_lambda:") :]

    return get


def instructions(text):
    """The tile instructions and the calls, in order, and what they are given."""
    return re.findall(r"\t(ldtilecfg|tile\w+|tdp\w+|call\w*)\t?(.*)", text)


@pytest.mark.parametrize("mcpu", ["sapphirerapids", "graniterapids"])
def test_a_step_is_four_loads_and_four_products(run_code, mcpu):
    text = run_code(768, 64, mcpu)
    blocks = re.split(r"\n\.L\w+:|\n\tj\w+\t.*", text)
    steps = [instructions(block) for block in blocks if "tdpbf16ps" in block]
    loads = [[re.findall(r"%tmm(\d)", rest)[0] for name, rest in step if name == "tileloadd"] for step in steps]
    products = [[re.findall(r"%tmm(\d)", rest) for name, rest in step if name == "tdpbf16ps"] for step in steps]
    narrow = [["6", "4", "0"], ["7", "4", "1"]]  # a tile of at most 16 rows
    assert sorted(products) == sorted([narrow, [*narrow, ["6", "5", "2"], ["7", "5", "3"]]])
    assert sorted(map(sorted, loads)) == [["4", "5", "6", "7"], ["4", "6", "7"]]
    assert not re.search(r"vmov\w+\s+(%zmm\d+, .*\(%rsp\)|.*\(%rsp\), %zmm)", text), "vectors on the stack"


@pytest.mark.parametrize("k,passes", [(64, 1), (72, 2), (16, 1)])
def test_nothing_is_called_while_tiles_are_configured(run_code, k, passes):
    names = [name for name, _ in instructions(run_code(k, 64))]
    assert names.count("ldtilecfg") == 2 * passes  # with and without the lower half
    assert names.count("tilestored") == (4 + 2) * passes and names.count("tilezero") == 4 + 2
    assert names[0] == names[-1] == "callq" and names.count("callq") == 2, "memory for `acc`, once for all tiles"
    assert names[-2] == "tilerelease" and names.count("tilerelease") == 1
