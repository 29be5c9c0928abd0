"""Kernels as data: to text and back, nothing else is taken, and what logs were measured on does not change unseen."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sized_operators as sized
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm import schedules
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.ops import Attention, Linear, Operator, formats
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu import linear, tiles
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES
from turbo_tvm.schedules.registry import FAMILIES, Tiles

BF16, FP16 = formats.BF16.storage, formats.FP16.storage
GOLDEN = Path(__file__).with_name("kernels_with_a_version.json")
RENEW = "PYTHONPATH=scripts python tests/compiler/test_kernel_recipe.py"


def heads(geometry: Tiles, **more: Any) -> Attention:
    """An attention of 4 heads whose operands lie side by side."""
    return sized.attention(geometry, 4, 64, 512, columns=[(768, 0), (768, 256), (768, 512)], scale=0.125, **more)


def small(geometry: Tiles = tiles.AVX2, **more: Any) -> Linear:
    """A product of 8 by 8."""
    return sized.linear(geometry, 8, 8, **more)


@st.composite
def products(draw: st.DrawFn, geometry: Tiles) -> Linear:
    """A product of any sizes; its activation may be any text: only building looks at that."""

    def rows(dtypes):
        return st.builds(Operand.rows, st.integers(1, 1 << 20), st.sampled_from(dtypes), st.just(geometry.row_tile))

    every = [known.storage for known in formats.FORMATS]
    names = {"activation": st.none() | st.text(), "norm_eps": st.none() | st.floats(allow_nan=False)}
    names |= {"residual": st.booleans() | rows(every), "x": rows(every), "out": rows(every)}
    sizes = st.integers(1, 1 << 20).map(lambda half: 2 * half), st.integers(1, 1 << 20)
    return sized.linear(geometry, *map(draw, sizes), **draw(st.fixed_dictionaries({}, optional=names)))


geometries = st.sampled_from([tiles.AVX512, tiles.AMX, tiles.AVX2, tiles.NEON, tiles.BASELINE])


@settings(max_examples=200)
@given(geometries.flatmap(lambda geometry: st.tuples(st.just(geometry), products(geometry))))
def test_to_text_and_back(case):
    geometry, operator = case
    recipe = KernelRecipe.of(operator, geometry)
    text = recipe.to_json()
    back = KernelRecipe.from_json(text)
    assert back == recipe and hash(back) == hash(recipe) and back.to_json() == text
    assert types_of(back.operator) == types_of(operator), "True is not 1, nor 1.0"


def types_of(operator: Operator) -> dict[str, type]:
    return {field.name: type(getattr(operator, field.name)) for field in fields(operator)}


def test_the_order_of_fields_does_not_matter():
    recipe = KernelRecipe.of(small(activation="gelu"), tiles.AVX2)
    text = json.dumps(dict(reversed(json.loads(recipe.to_json()).items())))
    assert text != recipe.to_json()
    assert KernelRecipe.from_json(text) == recipe and KernelRecipe.from_json(text).to_json() == recipe.to_json()


@pytest.mark.parametrize(
    "operator,geometry,device",
    [
        (heads(tiles.AVX512), tiles.AVX512, "cpu"),
        (sized.tile_rows(tiles.NEON, 8), tiles.NEON, "cpu"),
        (sized.pack_weight(tiles.AVX2, 8, 8, BF16), tiles.AVX2, "cpu"),
        (sized.pack_weight(CUDA_TILES, 8, 8, FP16), CUDA_TILES, "cpu"),
        (sized.cast_rows(CUDA_TILES, 8, sized.rows(CUDA_TILES, 8, FP16)), CUDA_TILES, "cuda"),
    ],
    ids=["attention", "rows", "weights", "weights for a GPU", "rows on a GPU"],
)
def test_recipes_of_all_kinds(operator, geometry, device):
    recipe = KernelRecipe.of(operator, geometry)
    assert KernelRecipe.from_json(recipe.to_json()) == recipe
    assert recipe.device == device
    assert recipe.build().params


def test_a_kernel_is_built_once_with_its_variants():
    recipe = KernelRecipe.of(small(), tiles.AVX2)
    variants = (Variant((("group", 2),)),)
    assert recipe.build((), variants).same_as(KernelRecipe.from_json(recipe.to_json()).build((), variants))
    assert not tvm_ffi.structural_equal(recipe.build(), recipe.build((), variants))
    with pytest.raises(ValueError, match="there is no knob"):
        recipe.build((), (Variant((("other", 2),)),))


def test_what_can_be_tuned():
    recipe = KernelRecipe.of(small(), tiles.AVX2)
    assert recipe.version == linear.VERSION > 0
    assert recipe.space == linear.space(small(), tiles.AVX2) and recipe.space.most > 1


def test_kernels_without_a_version_have_nothing_to_tune():
    recipe = KernelRecipe.of(sized.gate(tiles.AVX2, 8, "gelu"), tiles.AVX2)
    assert recipe.version == 0 and recipe.space == Space()


GOOD = json.loads(KernelRecipe.of(small(residual=True, norm_eps=1e-5), tiles.AVX2).to_json())


def changed(**parts):
    return json.dumps({**GOOD, **parts})


def without(name):
    return json.dumps({key: value for key, value in GOOD.items() if key != name})


def spelt(name, value):
    """A field with a value that JSON's writer does not write."""
    return changed(**{name: "HERE"}).replace('"HERE"', value)


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "nothing": "",
    "no JSON": "cpu.linear.linear",
    "a number": "1",
    "null": "null",
    "a list": "[]",
    "an empty object": "{}",
    "deep": "[" * 100_000,
    "a deep family": spelt("family", DEEP),
    "deep tiles": spelt("tiles", DEEP),
    "a deep operator": spelt("operator", DEEP),
    "a deep operand": spelt("x", DEEP),
    "a deep dimension": spelt("x", f'[[{DEEP}],"float32"]'),
    "a deep option": spelt("activation", DEEP),
    "a deep key": changed().replace("{", '{"other":' + DEEP + ",", 1),
    "a long number": spelt("columns", "1" * 10_000),
    "a long dimension": spelt("bias", "[[" + "1" * 10_000 + '],"float32"]'),
    "surrogates": changed(family="\ud800.linear"),
    "a recipe of another turbo_tvm": '{"options":{"k":8,"n":8},"schedule":"linear.linear","tiles":null}',
    **{f"without {name}": without(name) for name in GOOD if name not in ("residual", "gamma", "beta", "norm_eps")},
    **{
        f"family {name!r}": changed(family=name)
        for name in (
            *("os.system", "cpu.linear.tvm.os.system", "..os.system", "tuning.search.propose", "builtins.eval"),
            *("", ".", "cpu", "cpu.linear", "cpu.linear.", ".linear.linear", "linear.linear", "cpu.linear.eval"),
            *("cpu.linear.linear.linear", "cpu.linear.other", "cpu.linear.LINEAR", "CPU.linear.linear"),
            *("cpu.linear.__init__", "cpu.linear.__doc__", "cpu.linear.__loader__", "cpu.linear.__class__"),
            *("cpu.__init__.linear", "cpu.linear.__builtins__", "cpu.linear.by_rows", "cpu.linear.space"),
            *("cpu.linear.Product", "cpu.linear._multiply_macro", "cpu.linear.VERSION", "cpu.linear.T"),
            *("cpu.linear_amx.Run", "cpu.attention_amx.refuses", "cpu/linear/../linear.linear"),
            *("cpu.gate.gate", "cuda.linear.linear", "common.weights.pack_weight"),
            *(1, None, True, ["cpu.linear.linear"], {"cpu.linear.linear": 1}),
        )
    },
    **{
        f"tiles {value!r}"[:60]: changed(tiles=value)
        for value in (
            *(1, "AVX2", [], {}, {"lanes": 8}, {**GOOD["tiles"], "lanes": "8"}, {**GOOD["tiles"], "lanes": 8.0}),
            *({**GOOD["tiles"], "amx": 1}, {**GOOD["tiles"], "row_tile": None}, {**GOOD["tiles"], "other": 1}, None),
            {"row_tile": "1", "col_tile": 128, "query_tile": 64},
            {"row_tile": 1, "col_tile": 128, "query_tile": 64},  # a GPU's
        )
    },
    **{
        f"operator {value!r}"[:60]: changed(operator=value)
        for value in (*(1, None, True, [], {}, "", "Linear", "norm", "turbo.linear", "eval"), ["linear"])
    },
    **{
        f"{name} {value!r}"[:60]: changed(**{name: value})
        for name in ("x", "out", "residual")
        for value in (
            *(1, None, "k", [], {}, [[8]], [[8], "float32", 1], ["float32", [8]], [8, "float32"], [[8], 1]),
            *([["8"], "float32"], [[8.0], "float32"], [[True], "float32"], [[0], "float32"], [[-8], "float32"]),
            *([[[8]], "float32"], [[8], None], [{"a": 1}, "float32"], {"shape": [8], "dtype": "float32"}),
            [[[8], "float32"]],
        )
    },
    **{
        f"{name} {value!r}"[:60]: changed(**{name: value})
        for name, values in {
            "activation": (1, True, 1.0, [], {}, ["gelu"]),
            "norm_eps": ("1e-5", 1, True, [1e-5], {}),
            "columns": (8.0, "8", True, [8], {}),
            "other": (1, None),
            "k": (8,),
            "NAME": ("linear",),
            "__class__": (1,),
            "tensors": (["x"],),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no kernel of this turbo_tvm: "):
        KernelRecipe.from_json(text)


@pytest.mark.parametrize("geometry", [tiles.AVX2, CUDA_TILES], ids=["cpu", "gpu"])
def test_an_operator_without_a_kernel_has_no_recipe(geometry):
    operator = {tiles.AVX2: sized.softmax, CUDA_TILES: sized.tile_rows}[geometry](geometry, 8)
    with pytest.raises(LookupError, match=f"no kernel for {operator.NAME}: {operator.NAME}, which the target has no"):
        KernelRecipe.of(operator, geometry)


plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())


@settings(max_examples=300)
@given(st.recursive(plain, lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_other_text_is_refused(value):
    for text in (json.dumps(value), changed(family=value), changed(tiles=value), changed(operator=value)):
        with pytest.raises(ValueError, match="no kernel of this turbo_tvm: "):
            KernelRecipe.from_json(text)


def with_a_version() -> dict[str, KernelRecipe]:
    """A kernel of each family that can be tuned."""
    product = {"activation": "gelu", "residual": True}
    norm, vectors = {"eps": 1e-5, "residual": True}, {"norm_eps": 1e-5}
    wide, amx, gpu = tiles.AVX512, tiles.AMX, CUDA_TILES
    narrow = {"dtype": BF16, "out": sized.rows(amx, 256, BF16)}
    in_bf16 = {"x": sized.rows(amx, 768, BF16), "out": sized.rows(amx, 3008, BF16)}
    made = {
        "cpu.linear.linear": (wide, sized.linear(wide, 768, 3000, **product, **vectors)),
        "cpu.linear_amx.linear": (amx, sized.linear(amx, 768, 3000, **product, **vectors, **in_bf16)),
        "cpu.attention.attention": (wide, heads(wide, position_bias=True)),
        "cpu.attention_amx.attention": (amx, heads(amx, **narrow)),
        "cpu.normalization.norm": (wide, sized.norm(wide, 768, **norm)),
        "cpu.normalization.l2_normalize": (wide, sized.l2_normalize(wide, 768)),
        "cpu.embedding.embedding": (wide, sized.embedding(wide, 768, 3, **vectors)),
        "cpu.pooling.pool": (wide, sized.pool(wide, 768, "mean")),
        "cuda.linear.linear": (gpu, sized.linear(gpu, 768, 3000, x=sized.rows(gpu, 768, FP16), **product)),
        "cuda.attention.attention": (gpu, heads(gpu, position_bias=True)),
        "cuda.normalization.norm": (gpu, sized.norm(gpu, 768, **norm)),
        "cuda.normalization.l2_normalize": (gpu, sized.l2_normalize(gpu, 768)),
        "cuda.embedding.embedding": (gpu, sized.embedding(gpu, 768, 3, **vectors)),
        "cuda.softmax.softmax": (gpu, sized.softmax(gpu, 768)),
        "cuda.pooling.pool": (gpu, sized.pool(gpu, 768, "mean")),
        "cuda.gate.gate": (gpu, sized.gate(gpu, 768, "gelu")),
        "cuda.rows.cast_rows": (gpu, sized.cast_rows(gpu, 768, sized.rows(gpu, 768, FP16))),
        "cuda.rotary.rotary": (gpu, sized.rotary(gpu, 768, ((0, 12),), head_dim=64, dims=64, positions=512)),
    }
    return {name: KernelRecipe.of(operator, geometry) for name, (geometry, operator) in made.items()}


def fingerprint(recipe: KernelRecipe) -> dict[str, object]:
    """What the file holds of a kernel; its hash is the same in every process."""
    return {"version": recipe.version, "hash": f"{tvm_ffi.structural_hash(recipe.build()) & (1 << 64) - 1:016x}"}


def fingerprints() -> dict[str, dict[str, object]]:
    """Of every family; made in a process of its own: what ran before in one can change hashes of AMX kernels."""
    return {name: fingerprint(recipe) for name, recipe in with_a_version().items()}


@pytest.fixture(scope="module")
def now() -> dict[str, dict[str, object]]:
    found = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, "print"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=found)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", list(with_a_version()))
def test_a_kernel_that_changed_has_another_version(name, now):
    """Logs of the tuner hold for a version: what they were measured on must be what is built."""
    kept, found = json.loads(GOLDEN.read_text()).get(name, {}), now[name]
    module = name.rpartition(".")[0].replace(".", "/")
    if kept and kept["version"] == found["version"] and kept["hash"] != found["hash"]:
        pytest.fail(
            f"the kernel {name} changed, so that tuning logs of it no longer hold: raise VERSION in "
            f"schedules/{module}.py, then run `{RENEW}`"
        )
    assert kept == found, f"VERSION of {name} changed: run `{RENEW}`"


def test_every_family_that_can_be_tuned_is_kept():
    """Those of the registry; and no module declares what the registry does not know."""
    tuned = {family.name for family in FAMILIES if family.version}
    assert tuned == {recipe.family.name for recipe in with_a_version().values()} == set(with_a_version())
    assert tuned == {family.name for family in FAMILIES if family.space is not None}, "a space has a version"
    assert set(json.loads(GOLDEN.read_text())) == tuned

    found = pkgutil.walk_packages(schedules.__path__, "turbo_tvm.schedules.")
    modules = [importlib.import_module(item.name) for item in found if not item.ispkg]
    names = {module: module.__name__.removeprefix("turbo_tvm.schedules.") for module in modules}
    for declared in ("VERSION", "space"):
        declaring = {names[module] for module in modules if hasattr(module, declared)}
        assert declaring == {name.rpartition(".")[0] for name in tuned}


if __name__ == "__main__":
    text = json.dumps(fingerprints(), indent=2, sort_keys=True)
    if sys.argv[1:] == ["print"]:
        print(text)
    else:
        GOLDEN.write_text(text + "\n")
