"""Attention in AMX tiles against float64 over ragged batches, what must not leak, and its machine code.

The instructions are this machine's where it has them, and functions of the same kind everywhere: see `conftest.py`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.ops import Attention
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import amx, attention, attention_amx, tiles

MAX_LENGTH = 512
RAGGED = (1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 127, 128, 511, 512)
FP32, BF16 = "float32", "uint16"
HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
R = tiles.AMX.row_tile
BLOCK = 32  # of queries, of keys and of columns


@dataclass(frozen=True)
class Heads:
    """heads x head_dim, with Q, K and V side by side in one buffer or in three.

    wider: by how much rows are wider than their columns; variants: of the kernel.
    """

    heads: int
    head_dim: int
    merged: bool = True
    wider: int = 0
    scale: float | None = None
    max_length: int = MAX_LENGTH
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
    def widths(self) -> list[int]:
        """Columns of Q, K and V."""
        return [self.hidden, *[(self.kv_heads or self.heads) * self.head_dim] * 2]


def operator_of(shape: Heads) -> Attention:
    h, more = shape.hidden, shape.wider
    return sized.attention(
        tiles.AMX,
        shape.heads,
        shape.head_dim,
        shape.max_length,
        columns=sized.qkv_columns(shape.widths, merged=shape.merged, wider=more),
        scale=shape.factor,
        kv_heads=shape.kv_heads,
        window=shape.window,
        dtype=BF16,
        out=sized.rows(tiles.AMX, h + more, BF16),
    )


@functools.cache
def kernel_of(shape: Heads, instructions: str = amx.LLVM) -> tvm.tirx.PrimFunc:
    return attention_amx.attention(operator_of(shape), tiles.AMX, shape.variants, instructions)


def spans_of(lengths) -> list[tuple[int, int]]:
    """Where sequences begin and end that follow one another."""
    return list(pairwise(np.cumsum([0, *lengths]).tolist()))


def query_tiles(spans) -> np.ndarray:
    rows = [(first, begin, end) for begin, end in spans for first in range(begin, end, BLOCK)]
    return np.array(rows, "int32").reshape(-1, 3)


def expected(qkv: np.ndarray, span: tuple[int, int], shape: Heads) -> tuple[np.ndarray, np.ndarray]:
    """The result for a sequence, and how much rounding to bf16 may change it: that of the weights and of the result."""
    exact = qkv[slice(*span)].astype(ml_dtypes.bfloat16).astype("float64")
    parts = np.split(exact, np.cumsum(shape.widths)[:2], axis=1)
    q, k, v = (part.reshape(len(exact), -1, shape.head_dim).transpose(1, 0, 2) for part in parts)
    k, v = (np.repeat(x, shape.heads // len(x), axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) * shape.factor
    if shape.window is not None:
        far = np.abs(np.arange(len(exact)) - np.arange(len(exact))[:, None]) > shape.window
        scores = np.where(far, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    both = np.stack([weights @ v, HALF_ULP * (weights @ abs(v) + abs(weights @ v))])
    return tuple(both.transpose(0, 2, 1, 3).reshape(2, len(exact), -1))


def check(out, qkv, spans, shape, atol=5e-6, rtol=1e-5) -> None:
    outside = np.ones(len(out), bool)
    for span in spans:
        wanted, rounding = expected(qkv, span, shape)
        bound = atol + rtol * np.abs(wanted) + 1.01 * rounding
        assert (np.abs(out[slice(*span)] - wanted) - bound).max() <= 0, f"rows {span}"
        outside[slice(*span)] = False
    assert np.isnan(out[outside]).all(), "rows of no sequence are left as they are"


def check_use(use, spans, shape) -> None:
    """What the emulation saw: nothing wrong, and two products of whole blocks for each task."""
    assert not use.fault and not use.active and not use.repeated
    tiles_of_tasks = 0
    for first, begin, end in query_tiles(spans):
        last, reach = min(end, first + BLOCK), end - begin if shape.window is None else shape.window
        seen = min(end, last + reach) - max(begin, first - reach)
        tiles_of_tasks += -(-seen // BLOCK) * (4 if last - first > 16 else 2)
    assert use.products == 2 * shape.heads * shape.head_dim // BLOCK * tiles_of_tasks


@pytest.fixture
def attend(run_kernel, stored, loaded, tile_machine):
    """`attend(shape, qkv, spans)`: the output rows, surplus ones included; fails if tiles were misused.

    The output starts as NaN, which are left where nothing is written. Surplus rows of the input are NaN.
    """
    instructions, report = tile_machine.instructions, tile_machine.report

    def attend(shape: Heads, qkv: np.ndarray, spans) -> np.ndarray:
        parts = [qkv] * 3 if shape.merged else np.split(qkv, np.cumsum(shape.widths)[:2], axis=1)
        parts = [np.pad(part, ((0, -len(qkv) % R), (0, 0)), constant_values=np.nan) for part in parts]
        parts = [stored(part, BF16, part.shape[1] + shape.wider) for part in parts]
        inputs = [*(part.reshape(-1, R, part.shape[1]) for part in parts), query_tiles(spans)]
        if report is not None:
            report()
        kernel = kernel_of(shape, instructions=instructions)
        out = run_kernel(kernel, inputs, (len(inputs[0]), R, shape.hidden + shape.wider), dtype=BF16)
        if report is not None:
            check_use(report(), spans, shape)
        return loaded(out, shape.hidden).reshape(-1, shape.hidden)

    return attend


def random_qkv(rows: int, shape: Heads, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, sum(shape.widths)), dtype=FP32)


# few heads: the tasks of a short batch are as many parallel iterations; 12: an iteration has several
SEPARATE = Heads(3, 32, merged=False)
MERGED = Heads(12, 64)
SHAPES = [
    SEPARATE,
    MERGED,
    Heads(1, 32, wider=2, scale=1.0),
    Heads(2, 64, merged=False, wider=32),
    Heads(2, 96, wider=16),
    Heads(3, 96, merged=False, scale=0.5),
    Heads(2, 128, merged=False, wider=4, scale=0.03),
    Heads(4, 128),
    Heads(6, 32, kv_heads=2, window=40),
    Heads(4, 64, merged=False, kv_heads=1, window=3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_matches_float64(attend, shape):
    spans = spans_of(np.random.default_rng(2).permutation(RAGGED))
    qkv = random_qkv(spans[-1][1], shape)
    check(attend(shape, qkv, spans), qkv, spans, shape)


@pytest.mark.parametrize("length", [*range(1, 36), 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 511, 512])
def test_every_short_length(attend, length):
    qkv = random_qkv(length, SEPARATE, seed=length)
    check(attend(SEPARATE, qkv, [(0, length)]), qkv, [(0, length)], SEPARATE)


# of a scratch that is no longer than it must be
@pytest.mark.parametrize("longest", [1, 32, 33, 100])
def test_a_batch_of_the_longest_sequences(attend, longest):
    shape = replace(SEPARATE, max_length=longest)
    spans = spans_of([longest] * 40)
    qkv = random_qkv(spans[-1][1], shape)
    check(attend(shape, qkv, spans), qkv, spans, shape)


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_batches_that_end_with_the_buffer(attend, batch):
    lengths = np.random.default_rng(batch).integers(1, 40, batch)
    lengths[-1] += -lengths.sum() % R  # no surplus row follows
    spans = spans_of(lengths)
    qkv = random_qkv(spans[-1][1], SEPARATE)
    check(attend(SEPARATE, qkv, spans), qkv, spans, SEPARATE)


def test_rows_of_no_sequence_are_neither_used_nor_written(attend):
    spans = [(3, 20), (21, 22), (25, 90), (97, 129)]
    qkv = random_qkv(150, MERGED)
    for row in set(range(150)) - {row for span in spans for row in range(*span)}:
        qkv[row] = np.nan
    check(attend(MERGED, qkv, spans), qkv, spans, MERGED)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("length", [1, 5, 13, 16, 17, 33, 100])
def test_other_sequences_do_not_leak(attend, length, poison):
    spans = spans_of([70, length, 40])  # what came before has filled more of the scratch
    qkv = random_qkv(spans[-1][1], MERGED)
    own = slice(*spans[1])
    clean = attend(MERGED, qkv, spans)
    others = np.ones(len(qkv), bool)
    others[own] = False
    qkv[others] = poison
    poisoned = attend(MERGED, qkv, spans)
    np.testing.assert_array_equal(poisoned[own], clean[own])
    assert np.isfinite(clean).sum() == len(qkv) * MERGED.hidden


def test_alone_and_in_a_batch_give_the_same(attend):
    spans = spans_of([33, 12, 128, 1, 77])
    qkv = random_qkv(spans[-1][1], MERGED)
    together = attend(MERGED, qkv, spans)
    for begin, end in spans:
        alone = attend(MERGED, qkv[begin:end], [(0, end - begin)])
        np.testing.assert_array_equal(alone[: end - begin], together[begin:end])


def test_no_sequence_writes_nothing(attend):
    assert np.isnan(attend(SEPARATE, random_qkv(12, SEPARATE), [])).all()


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("length", [9, 50])
def test_large_scores_stay_finite_and_pick_the_largest(attend, magnitude, length):
    qkv = random_qkv(length, SEPARATE)
    q, k, _ = np.split(qkv, 3, axis=1)
    q *= np.float32(magnitude**0.5)
    k *= np.float32(magnitude**0.5)
    # a score of 1e4 has an ulp of 1e-3, and the scale's factor log2(e) another
    check(attend(SEPARATE, qkv, [(0, length)]), qkv, [(0, length)], SEPARATE, atol=2e-5 * magnitude)


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_equal_and_far_apart_values_are_weighted_as_in_float64(attend, spread):
    """Equal scores: the mean of the values, of an odd number of keys; scores far apart: weights down to 0."""
    qkv = random_qkv(101, SEPARATE)
    qkv[:, : SEPARATE.hidden] *= np.float32(spread)
    check(attend(SEPARATE, qkv, [(0, 101)]), qkv, [(0, 101)], SEPARATE, atol=1e-4)


SPACE = attention_amx.space(operator_of(SEPARATE), tiles.AMX)
SMALLEST, LARGEST = (tuple((knob.name, knob.values[place]) for knob in SPACE.knobs) for place in (0, -1))
BY_SIZE = Variant(SMALLEST, 36), Variant(LARGEST, 120), Variant()  # the last one has the defaults
BATCHES = [[1], [7, 1], [36], [33, 3], [37], [13, 12, 11, 5], [120], [71, 49], [121], [2, 130, 17, 16]]


def check_batches(attend, shape: Heads) -> None:
    for lengths in BATCHES:
        spans = spans_of(lengths)
        qkv = random_qkv(spans[-1][1], shape, seed=len(lengths))
        check(attend(shape, qkv, spans), qkv, spans, shape)


@pytest.mark.parametrize("setting", [SMALLEST, LARGEST], ids=["smallest", "largest"])
def test_all_knobs_at_their_ends(attend, setting):
    check_batches(attend, replace(SEPARATE, variants=(Variant(setting),)))


@pytest.mark.parametrize(
    "shape",
    [SEPARATE, pytest.param(Heads(6, 32, kv_heads=2, window=40), marks=pytest.mark.slow)],
    ids=["all", "window"],
)
def test_variants_by_rows(attend, shape):
    check_batches(attend, replace(shape, variants=BY_SIZE))


def test_the_default_variant_is_the_kernel_by_itself():
    plain = kernel_of(SEPARATE)
    for setting in ((), tuple(SPACE.default.items())):
        tvm.ir.assert_structural_equal(kernel_of(replace(SEPARATE, variants=(Variant(setting),))), plain)


@pytest.mark.parametrize("setting", [("score_keys", 8), ("chunks", 17), ("fetch", 2)])
def test_settings_that_do_not_exist_are_refused(setting):
    with pytest.raises(ValueError, match=r"there is no knob 'score_keys'|knob (chunks|fetch) cannot be"):
        kernel_of(replace(SEPARATE, variants=(Variant((setting,)),)))


def one_head(geometry, head_dim: int, x: str = BF16, out: str = BF16, **options) -> Attention:
    result = sized.rows(geometry, head_dim, out)
    return sized.attention(geometry, 1, head_dim, 8, columns=[(head_dim, 0)] * 3, dtype=x, out=result, **options)


def test_what_is_refused():
    def refuses(*heads, geometry=tiles.AMX, **options):
        return attention_amx.refuses(one_head(geometry, *heads, **options), geometry)

    assert not any(refuses(head_dim) for head_dim in (32, 64, 96, 128))
    assert all(refuses(d) == f"heads of {d} are no multiples of 32" for d in (8, 16, 36, 48, 80))
    for other in (refuses(64, FP32), refuses(64, BF16, FP32), refuses(64, geometry=tiles.AVX512)):
        assert other == "it is no attention in bf16 on AMX"
    for tables in ({"position_bias": True}, {"key_table": 15}, {"query_table": 15}):
        assert refuses(64, **tables) == "AMX's kernel knows no biases by distance"


@pytest.mark.parametrize(
    "geometry,head_dim,x,out",
    [
        (tiles.AMX, 48, BF16, BF16),
        (tiles.AMX, 32, FP32, BF16),
        (tiles.AMX, 32, BF16, FP32),
        (tiles.AVX2, 32, BF16, BF16),
        (replace(tiles.AVX2, amx=True), 32, BF16, BF16),
    ],
)
def test_what_does_not_fit_is_refused(geometry, head_dim, x, out):
    operator = one_head(geometry, head_dim, x, out)
    reason = attention_amx.refuses(operator, geometry) or "16 queries at once"
    with pytest.raises(ValueError, match=f"this attention does not fit AMX: {reason}"):
        attention_amx.attention(operator, geometry)


def test_the_same_parameters_as_without_amx():
    operator = one_head(tiles.AMX, 32)
    wanted, got = (make(operator, tiles.AMX) for make in (attention.attention, attention_amx.attention))
    assert [p.name for p in got.params] == [p.name for p in wanted.params]


@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_the_machine_code(assembly, head_dim):
    """A product has four loads or three, and tiles are configured once for all tasks of a parallel iteration."""
    target = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "sapphirerapids"}
    text = assembly(kernel_of(Heads(12, head_dim)), target)
    assert "vdpbf16ps" not in text and "exp2f" not in text and "expf" not in text
    assert not re.search(r"\bturbo_\w+@", text), "a function that was not imported"
    code = re.findall(r"\t(ldtilecfg|tile\w+|tdp\w+)\t?(.*)", text)
    names = [name for name, _ in code]
    assert names[0] == "ldtilecfg" and names.count("ldtilecfg") == 1
    assert names[-1] == "tilerelease" and names.count("tilerelease") == 1
    products = [tuple(re.findall(r"%tmm(\d)", rest)) for name, rest in code if name == "tdpbf16ps"]
    upper, lower = [("6", "4", "0"), ("6", "5", "2")], [("7", "4", "1"), ("7", "5", "3")]
    assert set(products) == {*upper, *lower}
    both, all_ = products.count(lower[0]), products.count(upper[0])
    assert names.count("tileloadd") == 4 * both + 3 * (all_ - both)
