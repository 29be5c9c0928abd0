"""Arrays for the tuner: of the shapes that a kernel takes, with values that make sense for what an operand is."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import sized_operators as sized
from tvm import tirx

from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.ops import Attention, Embedding, Operator, formats
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cpu.tiles import AMX, AVX2, AVX512
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES
from turbo_tvm.schedules.registry import FAMILIES, Tiles, named
from turbo_tvm.tuning.operands import Arrays, arrays

FP32, BF16, FP16 = formats.FP32.storage, formats.BF16.storage, formats.FP16.storage
LENGTHS = (1, 5, 33, 70, 3)
TOKENS = sum(LENGTHS)
CU_SEQLENS = [0, 1, 6, 39, 109, 112]


def heads(tiles: Tiles, width: int = 192, firsts: tuple[int, int, int] = (0, 64, 128), **more) -> Attention:
    """An attention of 2 heads whose operands lie side by side."""
    return sized.attention(tiles, 2, 32, 80, columns=[(width, first) for first in firsts], **more)


def rotary(tiles: Tiles, positions: int = 9):
    return sized.rotary(tiles, 96, ((0, 2), (64, 1)), head_dim=32, dims=16, positions=positions)


def cases() -> list[tuple[Tiles, Operator]]:
    """At least one operator of each family, with what it can have."""
    cpu, amx, gpu = AVX512, AMX, CUDA_TILES

    def half(width, tiles=amx, dtype=BF16):
        return sized.rows(tiles, width, dtype)

    common = [
        (tiles, operator)
        for tiles in (cpu, gpu)
        for operator in (
            sized.embedding(tiles, 48, 3, norm_eps=1e-5),
            sized.embedding(tiles, 48, 1),
            sized.linear(tiles, 48, 200, activation="gelu", residual=True, out=sized.rows(tiles, 208)),
            sized.gate(tiles, 48, "gelu"),
            rotary(tiles),
            heads(tiles, position_bias=True),
            heads(tiles, 64, (0, 0, 0), window=4),
            sized.norm(tiles, 48, residual=True),
            sized.norm(tiles, 48, rms=True, x=sized.rows(tiles, 64)),
            sized.l2_normalize(tiles, 48, x=sized.rows(tiles, 80), out=sized.rows(tiles, 64)),
            sized.pool(tiles, 48, "mean"),
            sized.pool(tiles, 48, "first", row=2),
            sized.cast_rows(tiles, 48, sized.rows(tiles, 64, BF16)),
        )
    ]
    return [
        *common,
        (cpu, sized.linear(cpu, 48, 200, norm_eps=1e-5, x=half(64, cpu))),
        (amx, sized.linear(amx, 48, 200, residual=half(208), norm_eps=1e-5, x=half(64), out=half(208))),
        (amx, heads(amx, dtype=BF16, out=half(64))),
        (cpu, heads(cpu, dtype=BF16, key_table=128, query_table=128)),
        (cpu, sized.embedding(cpu, 48, 2, table_type=BF16, out=half(64, cpu))),
        (cpu, sized.tile_rows(cpu, 48)),
        (cpu, sized.untile_rows(cpu, 48)),
        (gpu, sized.linear(gpu, 48, 200, x=half(48, gpu, FP16), out=half(200, gpu, FP16))),
        (gpu, heads(gpu, dtype=FP16, out=half(64, gpu, FP16))),
        (gpu, sized.norm(gpu, 48, vectors=FP16, x=half(48, gpu, FP16), out=half(48, gpu, FP16))),
        (gpu, sized.softmax(gpu, 48)),
        (cpu, sized.pack_weight(cpu, 48, 200)),
        (cpu, sized.pack_weight(cpu, 48, 200, BF16)),
        (gpu, sized.pack_weight(gpu, 48, 200, FP16)),
        (cpu, sized.pack_bias(cpu, 200)),
        (cpu, sized.cast_weight((9, 48), BF16)),
        (cpu, sized.pack_distances(cpu, 2, 32, 31, 48, BF16)),
    ]


RECIPES = [KernelRecipe.of(operator, tiles) for tiles, operator in cases()]


def test_every_family_has_arrays():
    assert {recipe.family.name for recipe in RECIPES} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.family.name}-{r.operator.kernel_name()}")
def test_arrays_have_the_shapes_of_the_kernels_parameters(recipe):
    made = arrays(recipe, LENGTHS)
    params = recipe.build().params
    assert len(params) == len(made.arguments) + 1
    sizes: dict[str, int] = {}
    for param, array in zip(params, (*made.arguments, made.out), strict=True):
        buffer = param.ty
        assert array.dtype == str(buffer.dtype).removeprefix("T."), param.name
        assert array.ndim == len(buffer.shape) and array.flags.c_contiguous, param.name
        for dimension, size in zip(buffer.shape, array.shape, strict=True):
            fixed = isinstance(dimension, int | tirx.IntImm)
            wanted = int(dimension) if fixed else sizes.setdefault(dimension.name, size)
            assert size == wanted, f"{param.name}: {array.shape}, {buffer.shape}"


@pytest.mark.parametrize("tiles", [AVX2, AVX512, CUDA_TILES], ids=str)
def test_rows_are_those_of_the_batch(tiles):
    batch = -(-TOKENS // tiles.row_tile)
    made = arrays(KernelRecipe.of(sized.linear(tiles, 48, 200, residual=True), tiles), LENGTHS)
    x, _, _, residual = made.arguments
    assert x.shape == (batch, tiles.row_tile, 48)
    assert residual.shape == made.out.shape == (batch, tiles.row_tile, 200)


def test_rows_without_tiles_are_as_many_as_the_tokens():
    into, out_of = (KernelRecipe.of(make(AVX512, 48), AVX512) for make in (sized.tile_rows, sized.untile_rows))
    for made in (arrays(into, LENGTHS[:-1]), arrays(out_of, LENGTHS[:-1])):
        shapes = {made.arguments[0].shape, made.out.shape}
        assert shapes == {(109, 48), (28, 4, 48)}


@pytest.mark.parametrize("tiles", [AVX512, CUDA_TILES], ids=["cpu", "gpu"])
@pytest.mark.parametrize("positions", [1, 9, 5000])
def test_position_ids_are_rows_of_the_rotary_table(tiles, positions):
    _, ids, table = arrays(KernelRecipe.of(rotary(tiles, positions), tiles), LENGTHS).arguments
    assert table.shape == (positions, 16) and ids.dtype == np.int32
    check_ids(ids, positions)


@pytest.mark.parametrize("tiles", [AVX512, CUDA_TILES], ids=["cpu", "gpu"])
def test_ids_are_rows_of_tables_of_any_number(tiles):
    *ids, first, second, third, _, _ = arrays(
        KernelRecipe.of(sized.embedding(tiles, 48, 3, norm_eps=1e-5), tiles), LENGTHS
    ).arguments
    for each, table in zip(ids, (first, second, third), strict=True):
        check_ids(each, len(table))


def test_the_ith_ids_are_rows_of_the_ith_table():
    sizes = (700, 3, 1)
    ids = tuple(Operand((None, 4), "int32") for _ in sizes)
    tables = tuple(Operand((rows, 48), FP32) for rows in sizes)
    operator = Embedding(ids=ids, tables=tables, out=Operand.rows(48, FP32, 4))
    made = arrays(KernelRecipe(named("cpu.embedding.embedding"), AVX512, operator), LENGTHS).arguments
    assert [array.shape[0] for array in made[3:]] == list(sizes)
    for each, rows in zip(made[:3], sizes, strict=True):
        check_ids(each, rows)


def check_ids(ids: np.ndarray, rows: int) -> None:
    """All are rows of a table, and where it has several they are spread over them."""
    assert ids.min() >= 0 and ids.max() < rows
    assert len(np.unique(ids)) >= min(rows, 8)
    assert rows == 1 or ids.max() >= rows // 2


@pytest.mark.parametrize("tiles", [AMX, AVX2, CUDA_TILES], ids=["amx", "avx2", "gpu"])
def test_query_tiles_are_those_of_the_kernels_tiles(tiles):
    more = {"dtype": BF16, "out": sized.rows(tiles, 64, BF16)} if tiles is AMX else {}
    found = arrays(KernelRecipe.of(heads(tiles, **more), tiles), LENGTHS).arguments[3]
    step = {AMX: 32, AVX2: 16, CUDA_TILES: 64}[tiles]
    wanted = [(first, begin, end) for begin, end in pairwise(CU_SEQLENS) for first in range(begin, end, step)]
    assert found.dtype == np.int32 and found.tolist() == [list(task) for task in wanted]


@pytest.mark.parametrize(
    "columns,shared",
    [
        ([(192, 0), (192, 64), (192, 128)], (0, 0, 0)),
        ([(64, 0), (64, 0), (64, 0)], (0, 1, 2)),
        ([(64, 0), (128, 0), (128, 64)], (0, 1, 1)),
        ([(128, 0), (128, 64), (64, 0)], (0, 0, 2)),
    ],
    ids=["q, k and v", "none", "k and v", "q and k"],
)
def test_operands_that_lie_in_one_array_are_one(columns, shared):
    recipe = KernelRecipe.of(sized.attention(AVX512, 2, 32, 80, columns=columns), AVX512)
    qkv = arrays(recipe, LENGTHS).arguments[:3]
    assert [next(i for i, one in enumerate(qkv) if one is array) for array in qkv] == list(shared)
    assert [array.shape[-1] for array in qkv] == [width for width, _ in columns]


@pytest.mark.parametrize("tiles", [AVX512, CUDA_TILES], ids=["cpu", "gpu"])
def test_pooling_gets_where_sequences_begin_and_gives_a_row_for_each(tiles):
    x, places = (made := arrays(KernelRecipe.of(sized.pool(tiles, 48, "mean"), tiles), LENGTHS)).arguments
    assert places.dtype == np.int32 and places.tolist() == CU_SEQLENS
    assert made.out.shape == (-(-len(LENGTHS) // tiles.row_tile), tiles.row_tile, 48)
    assert x.shape[0] * x.shape[1] == TOKENS


@pytest.mark.parametrize("name", ["cpu.pooling.pool", "cuda.pooling.pool"])
@pytest.mark.parametrize("options", [{"row": 2}, {"token": 7}, {"row": 2, "token": 7}], ids=str)
def test_rows_that_are_pooled_to_lie_in_the_batch(name, options):
    """Also where the last sequence has fewer rows than the one that is asked for."""
    tiles = CUDA_TILES if name.startswith("cuda") else AVX512
    operator = sized.pool(tiles, 48, "first", **options)
    for recipe in (KernelRecipe.of(operator, tiles), KernelRecipe(named(name), tiles, operator)):
        x, places = arrays(recipe, (9, 5, 1)).arguments
        assert places.dtype == np.int32 and places.shape == (4,)
        rows = places[:3] + options.get("row", 0)
        assert rows.min() >= 0 and rows.max() < 15 <= x.shape[0] * x.shape[1]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_weights_keep_products_as_large_as_rows(dtype):
    operator = sized.linear(AVX512, 768, 512, x=sized.rows(AVX512, 768, dtype))
    x, weight, bias = arrays(KernelRecipe.of(operator, AVX512), (512,)).arguments
    if dtype == BF16:
        assert x.dtype == np.uint16 and weight.dtype == np.int32 and weight.shape == (16, 384, 32)
    assert np.std(in_fp32(x)) == pytest.approx(1, rel=0.02)
    assert np.std(in_fp32(weight)) == pytest.approx(768**-0.5, rel=0.02)
    assert np.std(in_fp32(bias)) == pytest.approx(1, rel=0.2) and bias.dtype == np.float32


def in_fp32(array: np.ndarray) -> np.ndarray:
    """The numbers of an array; words hold two in bf16 each."""
    return (array if array.dtype == np.float32 else array.view(ml_dtypes.bfloat16)).astype(np.float32)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.family.name}-{r.operator.kernel_name()}")
def test_numbers_are_finite(recipe):
    made = arrays(recipe, LENGTHS)
    tensors = [*recipe.operator.tensors, recipe.operator.out]
    for operand, array in zip(tensors, (*made.arguments, made.out), strict=True):
        if operand.dtype != formats.INDEX:
            numbers = array.astype(np.float32) if operand.dtype == FP16 else in_fp32(array)
            assert np.isfinite(numbers).all() and np.abs(numbers).max() < 10


def test_the_same_seed_makes_the_same_arrays():
    recipe = KernelRecipe.of(sized.embedding(AVX512, 48, 2, norm_eps=1e-5), AVX512)
    first, second, other = (arrays(recipe, LENGTHS, seed) for seed in (3, 3, 4))
    for one, same, different in zip(*map(everything, (first, second, other)), strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, different)


def everything(made: Arrays) -> tuple[np.ndarray, ...]:
    return (*made.arguments, made.out)


@pytest.mark.parametrize(
    "operator,lengths,bound",
    [
        (sized.linear(AVX512, 768, 3072), (16,), True),
        (sized.linear(AVX512, 768, 3072), (512,) * 8, False),
        (heads(AVX512), (1,), False),  # no weights at all
        (heads(AVX512, 64, (0, 0, 0), position_bias=True), (1,), False),
        (sized.embedding(AVX512, 48, 1), (16,), True),
    ],
)
def test_whether_weights_are_most_of_the_bytes(operator, lengths, bound):
    assert arrays(KernelRecipe.of(operator, AVX512), lengths).bound_by_weights is bound


def test_an_array_that_is_several_arguments_counts_once():
    """1,976 bytes of biases by distance, beside 768 of q, k and v together and 256 of the result."""
    operator = sized.attention(AVX2, 2, 16, 124, columns=[(96, 0), (96, 32), (96, 64)], position_bias=True)
    assert arrays(KernelRecipe.of(operator, AVX2), (2,)).bound_by_weights
