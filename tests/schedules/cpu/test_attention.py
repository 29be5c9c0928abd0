"""Attention against float64 over ragged batches, in fp32 and bf16, and what must not leak between sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.ops import Attention
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu import attention
from turbo_tvm.schedules.cpu.distances import pack_distances
from turbo_tvm.schedules.cpu.tiles import AVX512, NEON, CpuTiles, cpu_tiles

MAX_LENGTH = 512
RAGGED = (1, 2, 7, 11, 12, 13, 31, 32, 33, 128, 511, 512)
FP32, BF16 = "float32", "uint16"
HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
DISTANCE_WIDTH = 2 * MAX_LENGTH - 1 + 31  # the columns, and the widest query tile
POISON = 0xFF  # as a byte: NaN


@dataclass(frozen=True)
class Heads:
    """heads x head_dim, with Q, K and V side by side in one buffer or in three.

    distances: which tables there are over distances, of "keys" and "queries". dtype: of Q, K and V; out: of the result;
    wider: by how much rows are wider than their columns. kv_heads: of K and V, if fewer; window: how far a query sees.
    variants: of the kernel.
    """

    heads: int
    head_dim: int
    merged: bool = True
    bias: bool = False
    distances: tuple[str, ...] = ()
    dtype: str = FP32
    out: str = FP32
    wider: int = 0
    scale: float | None = None
    kv_heads: int | None = None
    window: int | None = None
    variants: tuple[Variant, ...] = field(default=(), repr=False)

    @property
    def factor(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def table(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim, 2 * MAX_LENGTH - 1

    @property
    def widths(self) -> list[int]:
        """Columns of Q, K and V."""
        return [self.hidden, *[(self.kv_heads or self.heads) * self.head_dim] * 2]

    def operator(self, tiles: CpuTiles) -> Attention:
        h, more = self.hidden, self.wider
        return sized.attention(
            tiles,
            self.heads,
            self.head_dim,
            MAX_LENGTH,
            columns=sized.qkv_columns(self.widths, merged=self.merged, wider=more),
            scale=self.factor,
            kv_heads=self.kv_heads,
            window=self.window,
            position_bias=self.bias,
            key_table=DISTANCE_WIDTH if "keys" in self.distances else 0,
            query_table=DISTANCE_WIDTH if "queries" in self.distances else 0,
            dtype=self.dtype,
            out=sized.rows(tiles, h + more, self.out),
        )

    def kernel(self, tiles: CpuTiles) -> tvm.tirx.PrimFunc:
        return attention.attention(self.operator(tiles), tiles, self.variants)


def query_tiles(lengths, queries: int) -> np.ndarray:
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = [(first, begin, end) for begin, end in pairwise(bounds) for first in range(begin, end, queries)]
    return np.array(rows, "int32").reshape(-1, 3)


def expected(
    qkv: np.ndarray, lengths, shape: Heads, bias: np.ndarray | None, tables=()
) -> tuple[np.ndarray, np.ndarray]:
    """The result of every row, and how much rounding to bf16 may change it: that of the weights and of the result."""
    out, begin = np.zeros((2, len(qkv), shape.hidden)), 0
    for length in lengths:
        rows = slice(begin, begin + length)
        parts = np.split(in_format(qkv[rows], shape.dtype), np.cumsum(shape.widths)[:2], axis=1)
        q, k, v = (part.reshape(length, -1, shape.head_dim).transpose(1, 0, 2) for part in parts)
        k, v = (np.repeat(x, shape.heads // len(x), axis=0) for x in (k, v))
        scores = q @ k.transpose(0, 2, 1)
        distance = np.arange(length)[:, None] - np.arange(length) + MAX_LENGTH - 1
        for kind, table in zip(shape.distances, tables, strict=True):
            by_distance = (q if kind == "keys" else k) @ in_format(table, shape.dtype)
            index = distance if kind == "keys" else distance.T
            picked = np.take_along_axis(by_distance, np.broadcast_to(index, scores.shape), -1)
            scores = scores + (picked if kind == "keys" else picked.transpose(0, 2, 1))
        scores = scores * shape.factor
        if bias is not None:
            scores += bias[:, np.arange(length) - np.arange(length)[:, None] + MAX_LENGTH - 1]
        if shape.window is not None:
            far = np.abs(np.arange(length) - np.arange(length)[:, None]) > shape.window
            scores = np.where(far, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = weights @ v
        rounding = HALF_ULP * ((shape.dtype == BF16) * (weights @ abs(v)) + (shape.out == BF16) * abs(context))
        out[:, rows] = np.stack([context, rounding]).transpose(0, 2, 1, 3).reshape(2, length, -1)
        begin += length
    return out[0, :begin], out[1, :begin]


def in_format(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(FP32 if dtype == FP32 else ml_dtypes.bfloat16).astype("float64")


def check(out, qkv, lengths, shape, bias=None, atol=5e-6, rtol=1e-5, tables=()) -> None:
    wanted, rounding = expected(qkv, lengths, shape, bias, tables)
    bound = atol + rtol * np.abs(wanted) + 1.01 * rounding
    assert (np.abs(out[: len(wanted)] - wanted) - bound).max() <= 0
    assert np.isnan(out[len(wanted) :]).all(), "surplus rows are left as they are"


@pytest.fixture
def target(arithmetic):
    return arithmetic.target


@pytest.fixture
def as_stored(arithmetic):
    """`as_stored(heads)`: these heads in the machine's arithmetic."""

    def as_stored(shape: Heads) -> Heads:
        return replace(shape, head_dim=arithmetic.even(shape.head_dim), dtype=arithmetic.dtype)

    return as_stored


@pytest.fixture(scope="session")
def packed(run_kernel):
    """`packed(table, dtype, tiles, target)`: a table over distances in the kernel's layout."""

    def pack(table: np.ndarray, dtype: str, tiles: CpuTiles, target: tvm.target.Target) -> np.ndarray:
        heads, head_dim, columns = table.shape
        pairs = dtype == BF16
        kernel = pack_distances(
            sized.pack_distances(tiles, heads, head_dim, columns, DISTANCE_WIDTH, dtype=dtype), tiles
        )
        size = heads * (head_dim // (2 if pairs else 1)) * DISTANCE_WIDTH
        return run_kernel(kernel, [table], [size], target, "int32" if pairs else FP32)

    return pack


@pytest.fixture(scope="session")
def compiled(stored, loaded, packed):
    """`compiled(shape, target)`: `run(qkv, lengths, bias, tables)` -> the output rows, surplus rows included.

    The output starts as NaN, which are left where nothing is written.
    """
    tvm.get_global_func("runtime.config_threadpool")(1, 2)
    kernels = {}

    def compile_(shape: Heads, target: tvm.target.Target):
        tiles = cpu_tiles(target)
        if (shape, str(target)) not in kernels:
            module = tvm.IRModule({"kernel": shape.kernel(tiles).with_attr("global_symbol", "kernel")})
            kernels[shape, str(target)] = tvm.compile(module, target=target)["kernel"]

        def run(qkv: np.ndarray, lengths, bias: np.ndarray | None = None, tables=()) -> np.ndarray:
            parts = [qkv] * 3 if shape.merged else np.split(qkv, np.cumsum(shape.widths)[:2], axis=1)
            surplus = -len(qkv) % tiles.row_tile
            parts = [np.pad(part, ((0, surplus), (0, 0))) for part in parts]
            parts = [stored(part, shape.dtype, part.shape[1] + shape.wider) for part in parts]
            width = shape.hidden + shape.wider
            out = np.full(((len(qkv) + surplus) * width * np.dtype(shape.out).itemsize), POISON, "uint8")
            arrays = [part.reshape(-1, tiles.row_tile, part.shape[1]) for part in parts]
            arrays += [query_tiles(lengths, tiles.query_tile)] + ([] if bias is None else [bias])
            arrays += [packed(table, shape.dtype, tiles, target) for table in tables]
            arrays.append(out.view(shape.out).reshape(-1, tiles.row_tile, width))
            arguments = [tvm.runtime.tensor(array) for array in arrays]
            kernels[shape, str(target)](*arguments)
            return loaded(arguments[-1].numpy(), shape.hidden).reshape(-1, shape.hidden)

        return run

    return compile_


def random_qkv(rows: int, shape: Heads, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, sum(shape.widths)), dtype="float32")


def random_bias(shape: Heads) -> np.ndarray | None:
    values = np.random.default_rng(1).standard_normal((shape.heads, 2 * MAX_LENGTH - 1), dtype="float32")
    return 3 * values if shape.bias else None


SHAPES = [
    Heads(12, 64),
    Heads(3, 32, merged=False, bias=True),
    Heads(1, 24),
    Heads(2, 36, merged=False),
    Heads(2, 7, bias=True),
    Heads(2, 80),
    Heads(6, 32, kv_heads=2, window=40),
]
FORMATS = [
    Heads(3, 32, wider=16),
    Heads(2, 24, merged=False, bias=True, wider=2),
    Heads(2, 80, merged=False, out=BF16),
    Heads(3, 64, out=BF16, wider=32),
    Heads(2, 32, scale=1.0),
    Heads(2, 48, bias=True, scale=0.03, out=BF16),
    Heads(4, 128, merged=False, bias=True, kv_heads=1, window=3),
]


@pytest.mark.parametrize("shape", FORMATS, ids=str)
@pytest.mark.parametrize(
    "arithmetic", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("fp32", "bf16")], indirect=True
)
def test_other_formats_and_scales_match_float64(shape, as_stored, target, compiled):
    shape = as_stored(shape)
    check_ragged_batch(compiled(shape, target), shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_matches_float64(shape, as_stored, target, compiled):
    shape = as_stored(shape)
    check_ragged_batch(compiled(shape, target), shape)


def check_ragged_batch(run, shape: Heads) -> None:
    lengths = np.random.default_rng(2).permutation(RAGGED)
    qkv, bias = random_qkv(sum(lengths), shape), random_bias(shape)
    check(run(qkv, lengths, bias), qkv, lengths, shape, bias)


@pytest.mark.parametrize(
    "arithmetic", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("fp32", "bf16")], indirect=True
)
@pytest.mark.parametrize(
    "shape",
    [
        Heads(2, 19, bias=True, distances=("keys", "queries")),
        pytest.param(Heads(2, 19, distances=("keys", "queries"), kv_heads=1, window=40), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tables_over_distances_match_float64(shape, as_stored, target, compiled):
    shape = as_stored(shape)
    lengths = np.random.default_rng(2).permutation([*RAGGED, *range(14, 22)])
    qkv, bias = random_qkv(sum(lengths), shape), random_bias(shape)
    tables = [np.random.default_rng(i).standard_normal(shape.table, "float32") for i, _ in enumerate(shape.distances)]
    check(compiled(shape, target)(qkv, lengths, bias, tables), qkv, lengths, shape, bias, tables=tables)


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_batches_that_end_with_the_buffer(batch, as_stored, target, compiled):
    shape = as_stored(Heads(3, 32, merged=False, bias=True))
    lengths = np.random.default_rng(batch).integers(1, 40, batch)
    lengths[-1] += -lengths.sum() % 12  # a multiple of every row tile: no surplus row follows
    qkv, bias = random_qkv(sum(lengths), shape), random_bias(shape)
    check(compiled(shape, target)(qkv, lengths, bias), qkv, lengths, shape, bias)


@pytest.mark.parametrize("length", [*range(1, 70), 95, 96, 97, 500, 511, 512])
def test_every_short_length(length, as_stored, target, compiled):
    shape = as_stored(Heads(2, 36, merged=False))
    qkv = random_qkv(length, shape, seed=length)
    check(compiled(shape, target)(qkv, [length]), qkv, [length], shape)


@pytest.mark.parametrize("length", [1, 31, 41, 75, 200])
def test_what_a_window_does_not_reach_does_not_matter(length, as_stored, target, compiled):
    shape = as_stored(Heads(6, 32, kv_heads=2, window=40))
    run, qkv = compiled(shape, target), random_qkv(length, shape)
    clean = run(qkv, [length])
    qkv[0, shape.hidden :] = np.nan  # key and value of the first token
    np.testing.assert_array_equal(run(qkv, [length])[41 + 32 : length], clean[41 + 32 : length])
    qkv[0] = 1e4
    np.testing.assert_array_equal(run(qkv, [length])[41:length], clean[41:length])


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("length", [1, 5, 13, 16, 17, 33, 100])
def test_other_sequences_do_not_leak(length, poison, as_stored, target, compiled):
    shape = as_stored(Heads(3, 32, merged=False, bias=True))
    lengths, bias = [9, length, 40], random_bias(shape)
    qkv = random_qkv(sum(lengths), shape)
    own = slice(9, 9 + length)
    others = np.ones(len(qkv), bool)
    others[own] = False
    run = compiled(shape, target)
    clean = run(qkv, lengths, bias)
    qkv[others] = poison
    np.testing.assert_array_equal(run(qkv, lengths, bias)[own], clean[own])


def test_alone_and_in_a_batch_give_the_same(as_stored, target, compiled):
    shape, lengths = as_stored(Heads(12, 64)), [33, 12, 128, 1, 77]
    qkv = random_qkv(sum(lengths), shape)
    run = compiled(shape, target)
    together, begin = run(qkv, lengths), 0
    for length in lengths:
        rows = slice(begin, begin + length)
        np.testing.assert_allclose(run(qkv[rows], [length])[:length], together[rows], rtol=0, atol=1e-6)
        begin += length


def test_no_sequence_writes_nothing(as_stored, target, compiled):
    shape = as_stored(Heads(12, 64))
    assert np.isnan(compiled(shape, target)(random_qkv(12, shape), [])).all()


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("length", [9, 50])
def test_large_scores_stay_finite_and_pick_the_largest(magnitude, length, as_stored, target, compiled):
    shape = as_stored(Heads(2, 36, merged=False))
    qkv = random_qkv(length, shape)
    q, k, _ = np.split(qkv, 3, axis=1)
    q *= np.float32(magnitude**0.5)
    k *= np.float32(magnitude**0.5)
    # a score of 1e4 has an ulp of 1e-3, and the scale's factor log2(e) another
    check(compiled(shape, target)(qkv, [length]), qkv, [length], shape, atol=2e-5 * magnitude)


@pytest.mark.parametrize("lowest", [-1e4, -1e9, np.finfo("float32").min])
def test_a_large_negative_bias_masks(lowest, as_stored, target, compiled):
    shape, length = as_stored(Heads(3, 32, merged=False, bias=True)), 45
    qkv, bias = random_qkv(length, shape), random_bias(shape)
    bias[:, MAX_LENGTH:] = lowest  # causal: keys after the query
    check(compiled(shape, target)(qkv, [length], bias), qkv, [length], shape, bias)


def test_a_bias_that_masks_every_key_stays_finite(as_stored, target, compiled):
    shape, length = as_stored(Heads(3, 32, merged=False, bias=True)), 20
    bias = np.full((shape.heads, 2 * MAX_LENGTH - 1), np.finfo("float32").min, "float32")
    assert np.isfinite(compiled(shape, target)(random_qkv(length, shape), [length], bias)[:length]).all()


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_equal_and_far_apart_values_are_weighted_as_in_float64(spread, as_stored, target, compiled):
    """Equal scores: the mean of the values, of an odd number of keys; scores far apart: weights down to 0."""
    shape, length = as_stored(Heads(3, 32)), 101
    qkv = random_qkv(length, shape)
    qkv[:, : shape.hidden] *= np.float32(spread)
    check(compiled(shape, target)(qkv, [length]), qkv, [length], shape, atol=1e-4)


TUNED = Heads(2, 20, merged=False)


def space(tiles: CpuTiles) -> Space:
    return attention.space(TUNED.operator(tiles), tiles)


KNOBS = [knob.name for knob in space(AVX512).knobs]


def end_of(tiles: CpuTiles, place: int, names=KNOBS) -> tuple[tuple[str, int], ...]:
    """The setting with the first (0) or last (-1) values of these knobs."""
    return tuple((knob.name, knob.values[place]) for knob in space(tiles).knobs if knob.name in names)


def by_size(tiles: CpuTiles, names) -> tuple[Variant, ...]:
    """The smallest values for up to 36 rows, the largest for up to 120, the defaults beyond."""
    return Variant(end_of(tiles, 0, names), 36), Variant(end_of(tiles, -1, names), 120), Variant()


# by row tiles of 4 and of 2 in each variant, on its bound and beyond; few queries and many, keys that are left over
BATCHES = [[1], [7, 1], [36], [33, 3], [37], [13, 12, 11, 5], [120], [71, 49], [121], [2, 130, 17, 16]]


def check_batches(run, shape: Heads, batches) -> None:
    for lengths in batches:
        qkv, bias = random_qkv(sum(lengths), shape, seed=len(lengths)), random_bias(shape)
        check(run(qkv, lengths, bias), qkv, lengths, shape, bias)


@pytest.mark.parametrize("place", [0, -1], ids=["smallest", "largest"])
@pytest.mark.parametrize(
    "arithmetic", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("fp32", "bf16")], indirect=True
)
def test_all_knobs_at_their_ends(place, as_stored, target, compiled):
    shape = replace(as_stored(TUNED), variants=(Variant(end_of(cpu_tiles(target), place)),))
    check_batches(compiled(shape, target), shape, [*([n] for n in range(1, 21)), [33], [13, 12, 11, 5], [2, 130, 17]])


def test_variants_by_rows(as_stored, target, compiled):
    shape = replace(as_stored(TUNED), variants=by_size(cpu_tiles(target), KNOBS))
    check_batches(compiled(shape, target), shape, BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_at_its_ends(name, as_stored, target, compiled):
    shape = as_stored(Heads(6, 32, kv_heads=2, window=40))
    three = replace(shape, variants=by_size(cpu_tiles(target), [name]))
    check_batches(compiled(three, target), three, BATCHES)
    for place in (0, -1):
        one = replace(shape, variants=(Variant(end_of(cpu_tiles(target), place, [name])),))
        check_batches(compiled(one, target), one, BATCHES)


def test_the_default_variant_is_the_kernel_by_itself():
    plain = TUNED.kernel(AVX512)
    for setting in ((), tuple(space(AVX512).default.items())):
        tvm.ir.assert_structural_equal(replace(TUNED, variants=(Variant(setting),)).kernel(AVX512), plain)


@pytest.mark.parametrize("setting", [("unroll", 2), ("chunks", 17), ("score_keys", 0), ("weigh_queries", 16)])
def test_settings_that_do_not_exist_are_refused(setting):
    with pytest.raises(ValueError, match=r"there is no knob 'unroll'|knob (chunks|score_keys|weigh_queries) cannot be"):
        replace(TUNED, variants=(Variant((setting,)),)).kernel(AVX512)


def test_neon_uses_vector_fma_and_calls_no_libm(assembly, neon_target):
    assert cpu_tiles(neon_target) is NEON
    text = assembly(Heads(12, 64).kernel(NEON), neon_target)
    assert "fmla" in text and "prfm" in text
    assert "expf" not in text and "exp2f" not in text


def test_parameters_follow_the_options():
    shapes = Heads(2, 32), Heads(2, 32, bias=True), Heads(2, 32, distances=("queries",))
    names = [[p.name for p in shape.kernel(NEON).params] for shape in shapes]
    assert names == [
        ["q_in", "k_in", "v_in", "query_tiles", "result"],
        ["q_in", "k_in", "v_in", "query_tiles", "bias", "result"],
        ["q_in", "k_in", "v_in", "query_tiles", "of_queries", "result"],
    ]
