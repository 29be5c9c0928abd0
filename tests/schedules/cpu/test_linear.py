"""The matrix kernel against float64 over ragged shapes and every epilogue, in fp32 and bf16, and its machine code."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import linear, tiles

EPS = 1e-5
FP32, BF16 = "float32", "uint16"
HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
GELU_BF16 = 8e-5  # what `gelu_bf16` may be off, times max(1, |x|)


def gelu64(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS = {
    None: lambda x: x,
    "gelu": gelu64,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def pack(geometry, w, bias):
    """NumPy's version of `pack_weight` and `pack_bias`; w is fp32, or bf16 of which pairs are packed."""
    panels, columns = geometry.panels(len(w)), geometry.col_tile
    padded = np.zeros((panels * columns, w.shape[1]), w.dtype)
    padded[: len(w)] = w
    padded = padded.view("int32" if w.dtype == BF16 else FP32)
    padded_bias = np.zeros(panels * columns, FP32)
    padded_bias[: len(w)] = bias
    return np.ascontiguousarray(padded.reshape(panels, columns, -1).transpose(0, 2, 1)), padded_bias


@functools.cache
def kernel_of(geometry, k, n, variants=(), **options):
    return linear.linear(sized.linear(geometry, k, n, **options), geometry, variants)


def space(geometry):
    return linear.space(sized.linear(geometry, 8, 40), geometry)


@pytest.fixture
def check(run_kernel, stored, loaded, arithmetic):
    """`check(t, k, n, ...)`: the kernel on so many row tiles against float64.

    extra, out: the residual's and the output's dtype; wider: by how much the rows of x, residual and output are.
    variants: of the kernel, a function of its tiles.
    """

    def check(
        t, k, n, activation=None, residual=False, norm=False, extra=FP32, out=FP32, wider=(0, 0, 0), variants=None
    ):
        geometry, k = tiles.cpu_tiles(arithmetic.target), arithmetic.even(k)
        formats = {
            "x": sized.rows(geometry, k + wider[0], arithmetic.dtype),
            "residual": sized.rows(geometry, n + wider[1], extra) if residual else False,
            "out": sized.rows(geometry, n + wider[2], out),
        }
        x = stored(draw(1, t, geometry.row_tile, k), arithmetic.dtype, k + wider[0])
        extra_rows = stored(draw(2, t, geometry.row_tile, n), extra, n + wider[1])
        w = stored(draw(3, n, k) / np.float32(math.sqrt(k)), arithmetic.dtype)
        bias, gamma, beta = draw(4, n), draw(5, n), draw(6, n)
        inputs = [x, *pack(geometry, w, bias)] + [extra_rows] * residual + [gamma, beta] * norm
        options = {"activation": activation, "norm_eps": EPS if norm else None}
        options["variants"] = variants(geometry) if variants else ()
        kernel = kernel_of(geometry, k=k, n=n, **options, **formats)
        shape = (t, geometry.row_tile, n + wider[2])
        got = loaded(run_kernel(kernel, inputs, shape, arithmetic.target, out), n)

        products = loaded(x, k) @ loaded(w, k).T + bias
        wanted = ACTIVATIONS[activation](products) + loaded(extra_rows, n) * residual
        bound = 1e-5 * math.sqrt(max(1, k / 100)) + 2e-5 * np.abs(wanted)  # fp32 sums of k terms around 1 / sqrt(k)
        if out == BF16:
            bound += HALF_ULP * np.abs(wanted)
            bound += 1.01 * GELU_BF16 * np.maximum(1, np.abs(products)) * (activation == "gelu")
        if norm:
            mean, deviation = wanted.mean(-1, keepdims=True), np.sqrt(wanted.var(-1, keepdims=True) + EPS)
            wanted = (wanted - mean) / deviation * gamma + beta
            if out == BF16:  # the norm reads what was rounded, and a row's mean and deviation move by less than that
                bound = 3 * bound.max(-1, keepdims=True) / deviation * np.abs(gamma) + HALF_ULP * np.abs(wanted)
            else:
                bound = 1e-5 * math.sqrt(max(1, k / 100)) + 2e-5 * np.abs(wanted)
        assert (np.abs(got - wanted) - bound).max() <= 0

    return check


# around a register tile, and around blocks of 192 rows: 48 row tiles on AVX-512, 96 on AVX2
@pytest.mark.parametrize("t", [*range(1, 21), 47, 48, 49, 95, 96, 97, 98, 145, 193])
def test_row_counts(check, t):
    check(t, 96, 96)


@pytest.mark.parametrize("n", [32, 70])
def test_every_row_tile_is_computed_once(run_kernel, stored, loaded, arithmetic, n):
    """The residual is the output itself: what is computed twice is added twice. Whole numbers, so sums are exact."""
    geometry, k = tiles.cpu_tiles(arithmetic.target), 4
    kernel = kernel_of(geometry, k=k, n=n, residual=True, x=sized.rows(geometry, k, arithmetic.dtype))
    rng = np.random.default_rng(0)
    w = rng.integers(-9, 10, (n, k)).astype(FP32)
    packed = pack(geometry, stored(w, arithmetic.dtype), np.zeros(n))
    for t in range(1, 203):
        x = rng.integers(-9, 10, (t, geometry.row_tile, k)).astype(FP32)
        before = rng.integers(-9, 10, (t, geometry.row_tile, n)).astype(FP32)
        inputs = [stored(x, arithmetic.dtype), *packed, before]
        after = run_kernel(kernel, inputs, before.shape, arithmetic.target, out=before)
        np.testing.assert_array_equal(after, before + x @ w.T, f"{t} row tiles")


def test_no_row_is_none(run_kernel, arithmetic):
    geometry = tiles.cpu_tiles(arithmetic.target)
    w = np.zeros((1, 4 if arithmetic.bf16 else 8, geometry.col_tile), "int32" if arithmetic.bf16 else FP32)
    kernel = kernel_of(geometry, k=8, n=8, x=sized.rows(geometry, 8, arithmetic.dtype))
    inputs = [np.zeros((0, geometry.row_tile, 8), arithmetic.dtype), w, np.zeros(geometry.col_tile, FP32)]
    assert run_kernel(kernel, inputs, (0, geometry.row_tile, 8), arithmetic.target).size == 0


# in fp32 and in pairs: less than a group of steps, whole groups, and one, two and three steps more
@pytest.mark.parametrize("k,n", [(1, 1), (3, 2), (10, 36), (39, 100), (96, 1003), (37, 33), (5, 64), (12, 40)])
def test_columns_that_do_not_fill_the_last_panel_or_group(check, k, n):
    for t in (2, 3, 40):
        check(t, k, n, residual=True)


@pytest.mark.parametrize("n", [64, 70])
@pytest.mark.parametrize("wider", [(16, 0, 0), (0, 16, 0), (0, 0, 16), (2, 4, 6), (32, 32, 32)], ids=str)
def test_wide_rows(check, wider, n):
    check(5, 40, n, residual=True, norm=n == 70, wider=wider)


@pytest.mark.parametrize("extra", [FP32, BF16])
@pytest.mark.parametrize("out", [FP32, BF16])
@pytest.mark.parametrize("n", [32, 35])
def test_formats_of_residual_and_output(check, extra, out, n):
    check(7, 48, n, activation="gelu", residual=True, norm=n == 35, extra=extra, out=out)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("out", [FP32, BF16])
def test_activations(check, activation, out):
    check(2, 48, 36, activation=activation, out=out)  # whole panels and a tail


@pytest.mark.parametrize("n,residual,activation", [(96, True, None), (100, False, "gelu"), (7, True, "relu")])
def test_norm(check, n, residual, activation):
    check(9, 36, n, activation=activation, residual=residual, norm=True)


@pytest.mark.parametrize("hidden", [768, 1024])
def test_the_sizes_of_a_bert_layer(check, arithmetic, hidden):
    check(2, hidden, 4 * hidden, activation="gelu", out=arithmetic.dtype, wider=(0, 0, 32))
    check(
        2, 4 * hidden, hidden, residual=True, norm=True, extra=arithmetic.dtype, out=arithmetic.dtype, wider=(32, 0, 0)
    )


@pytest.mark.parametrize("t", [1, 3, 4])
def test_surplus_rows_do_not_touch_the_others(run_kernel, stored, arithmetic, t):
    geometry, dtype = tiles.cpu_tiles(arithmetic.target), arithmetic.dtype
    x, (w, bias) = draw(1, t, geometry.row_tile, 40), pack(geometry, stored(draw(2, 64, 40), dtype), draw(3, 64))
    kernel = kernel_of(geometry, k=40, n=64, x=sized.rows(geometry, 40, dtype))
    rows = []
    for surplus in (0, 3e38, np.inf, np.nan):
        x[-1, 1:] = surplus
        out = run_kernel(kernel, [stored(x, dtype), w, bias], (t, geometry.row_tile, 64), arithmetic.target)
        rows.append(out.reshape(-1, 64)[: (t - 1) * geometry.row_tile + 1])
    for other in rows[1:]:
        np.testing.assert_array_equal(other, rows[0])


def test_a_row_does_not_depend_on_its_batch(run_kernel, stored, arithmetic):
    geometry, dtype = tiles.cpu_tiles(arithmetic.target), arithmetic.dtype
    x = stored(draw(1, 19, geometry.row_tile, 40), dtype)
    w, bias = pack(geometry, stored(draw(2, 70, 40), dtype), draw(3, 70))
    kernel = kernel_of(geometry, k=40, n=70, activation="gelu", x=sized.rows(geometry, 40, dtype))
    together = run_kernel(kernel, [x, w, bias], (19, geometry.row_tile, 70), arithmetic.target)
    for t in range(1, 8):  # register tiles of other heights
        part = run_kernel(kernel, [x[11 : 11 + t], w, bias], (t, geometry.row_tile, 70), arithmetic.target)
        np.testing.assert_array_equal(together[11 : 11 + t], part)


KNOBS = [knob.name for knob in space(tiles.AVX512).knobs]


def end_of(geometry, place, names=KNOBS):
    """The setting with the first (0) or last (-1) values of these knobs."""
    knobs = space(geometry).knobs
    return tuple((knob.name, knob.values[place]) for knob in knobs if knob.name in names)


def by_size(geometry, names):
    """The smallest values for up to 5 row tiles, the largest for up to 40, the defaults beyond."""
    smallest, largest = end_of(geometry, 0, names), end_of(geometry, -1, names)
    return Variant(smallest, 5 * geometry.row_tile), Variant(largest, 40 * geometry.row_tile), Variant()


@pytest.mark.parametrize("place", [0, -1], ids=["smallest", "largest"])
def test_all_knobs_at_their_ends(check, place):
    for t in (1, 2, 5, 13, 49, 97):
        check(t, 38, 40, residual=True, variants=lambda geometry: (Variant(end_of(geometry, place)),))


# around the bounds, and in each variant around a register tile and a block of rows
SIZES = (1, 2, 4, 5, 6, 7, 13, 39, 40, 41, 97)


def test_variants_by_rows(check):
    for t in SIZES:
        check(t, 38, 40, residual=True, variants=lambda geometry: by_size(geometry, KNOBS))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_at_its_ends(check, name):
    for t in SIZES:
        check(
            t, 38, 70, activation="gelu", residual=True, norm=True, variants=lambda geometry: by_size(geometry, [name])
        )
    for place in (0, -1):
        for t in (1, 5, 49):
            check(t, 38, 40, residual=True, variants=lambda g, place=place: (Variant(end_of(g, place, [name])),))


def test_the_default_variant_is_the_kernel_by_itself():
    plain = kernel_of(tiles.AVX512, k=8, n=40)
    whole = tuple(space(tiles.AVX512).default.items())
    for variants in ((Variant(),), (Variant(whole),)):
        tvm.ir.assert_structural_equal(kernel_of(tiles.AVX512, k=8, n=40, variants=variants), plain)


@pytest.mark.parametrize("setting", [("unroll", 2), ("group", 3), ("tile_units", 0), ("tile_units", 4)])
def test_settings_that_do_not_exist_are_refused(setting):
    with pytest.raises(ValueError, match=r"there is no knob 'unroll'|knob (group|tile_units) cannot be"):
        kernel_of(tiles.AVX512, k=8, n=40, variants=(Variant((setting,)),))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        kernel_of(tiles.AVX2, k=8, n=8, activation="swish")


def test_optional_inputs_are_no_parameters():
    def names(**options):
        return [p.name for p in kernel_of(tiles.AVX2, k=8, n=32, **options).params]

    assert names() == ["source", "weight", "bias", "result"]
    assert names(residual=True) == ["source", "weight", "bias", "residual_rows", "result"]
    assert names(norm_eps=1e-5) == ["source", "weight", "bias", "gamma", "beta", "result"]
    assert names(residual=True, norm_eps=1e-5)[3:6] == ["residual_rows", "gamma", "beta"]


def innermost_loops(text: str, instruction: str) -> list[list[str]]:
    """The loops with this instruction and no other loop inside: the lines from a label to a jump back to it."""
    lines, labels, found = text.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = i
        jump = re.match(r"\t(?:j\w+|b|b\.\w+|[ct]bn?z)\t.*?(\.L\w+)$", line)
        if jump and jump[1] in labels:
            found.append((labels[jump[1]], i))
    inner = [a for a in found if not any(a[0] <= b[0] and b[1] <= a[1] for b in found if b != a)]
    return [lines[a : b + 1] for a, b in inner if instruction in "\n".join(lines[a : b + 1])]


def check_loops(loops, geometry, instruction: str) -> None:
    """One loop for each height of a register tile: a group of steps over k.

    It asks for the lines of the panel's next row and, unless it skips them, for those of as many rows as it has steps;
    and for a line of the output, if LLVM has not taken that out of the loop of a low tile.
    """
    lines, vectors = max(1, geometry.col_tile // 16), geometry.row_tile * geometry.col_tile // geometry.lanes
    products = sorted(sum(instruction in line for line in loop) for loop in loops)
    group = space(geometry).default["group"]
    assert products == [group * vectors * height for height in range(1, geometry.tile_units + 1)]
    for loop in loops:
        blocks = re.split(r"\n\.L\w+:|\n\t(?:j|b\.|[ct]bn?z).*", "\n".join(loop))
        asked = [len(re.findall(r"\t(?:prefetch|prfm)", block)) for block in blocks]
        assert asked[:2] == [lines, (group - 1) * lines]
        assert sum(asked[2:]) <= 1


@pytest.mark.parametrize("n", [96, 100])
@pytest.mark.parametrize(
    "mcpu,register,geometry,dtype",
    [
        ("znver4", "zmm", tiles.AVX512, FP32),
        ("znver4", "zmm", tiles.AVX512, BF16),
        ("x86-64-v3", "ymm", tiles.AVX2, FP32),
    ],
)
def test_the_inner_loops_keep_their_tiles_in_registers(assembly, mcpu, register, geometry, dtype, n):
    kernel = kernel_of(geometry, k=96, n=n, x=sized.rows(geometry, 96, dtype))
    text = assembly(kernel, tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu}))
    instruction = "vdpbf16ps" if dtype == BF16 else "vfmadd"
    loops = innermost_loops(text, instruction)
    check_loops(loops, geometry, instruction)
    for loop in loops:
        assert not [line for line in loop if re.search(rf"vmov\w+\s+%{register}\d+, .*\(", line)], "a store"
        assert not [line for line in loop if re.search(rf"vmov\w+\s+.*\(%rsp\).*%{register}", line)], "a reload"
    assert "AllocWorkspace" not in text


def test_neon_compiles_to_fused_multiply_adds(assembly, neon_target):
    geometry = tiles.cpu_tiles(neon_target)
    assert geometry is tiles.NEON
    text = assembly(kernel_of(geometry, k=96, n=100), neon_target)
    loops = innermost_loops(text, "fmla")
    check_loops(loops, geometry, "fmla")
    assert not [line for loop in loops for line in loop if re.search(r"\tst[rp]\tq", line)]


def test_every_epilogue_compiles_for_neon(assembly, neon_target):
    kernel = kernel_of(tiles.NEON, k=96, n=100, activation="gelu", residual=True, norm_eps=EPS)
    assert "AllocWorkspace" not in assembly(kernel, neon_target)
