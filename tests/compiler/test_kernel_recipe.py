"""Kernels as data: to text and back, nothing else is taken, and what logs were measured on does not change unseen."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm import schedules
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.schedules.common import weights
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu import attention, gate, linear, rows, tiles
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cuda import rows as cuda_rows
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

BF16 = "uint16"
GOLDEN = Path(__file__).with_name("kernels_with_a_version.json")
HEADS = {"heads": 4, "head_dim": 64, "scale": 0.125, "max_length": 512, "q": (768, 0), "k": (768, 256), "v": (768, 512)}

formats = st.builds(RowFormat, width=st.integers(1, 1 << 20), dtype=st.sampled_from(["float32", BF16, "float16"]))
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    formats,
    st.tuples(st.integers(), formats),
)
# `linear` takes any value for these: only building it looks at them
names = ["activation", "residual", "norm_eps", "x", "extra", "out"]
options = st.fixed_dictionaries({"k": st.integers(), "n": st.integers()}, optional=dict.fromkeys(names, plain))
geometries = st.sampled_from([tiles.AVX512, tiles.AMX, tiles.AVX2, tiles.NEON, tiles.BASELINE])


@settings(max_examples=200, deadline=None)
@given(geometries, options)
def test_to_text_and_back(geometry, given_options):
    recipe = KernelRecipe.of(linear.linear, geometry, given_options)
    text = recipe.to_json()
    back = KernelRecipe.from_json(text)
    assert back == recipe and hash(back) == hash(recipe) and back.to_json() == text
    types = [(name, type(value)) for name, value in back.options]
    assert types == [(name, type(value)) for name, value in recipe.options], "True is not 1, nor 1.0"


def test_the_order_of_options_does_not_matter():
    a, b = ({"k": 8, "n": 4}, {"n": 4, "k": 8})
    texts = {KernelRecipe.of(linear.linear, tiles.AVX2, options).to_json() for options in (a, b)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "factory,geometry,given_options,device",
    [
        (attention.attention, tiles.AVX512, HEADS, "cpu"),
        (rows.tile_rows, tiles.NEON, {"columns": 8}, "cpu"),
        (weights.pack_weight, tiles.AVX2, {"k": 8, "n": 8, "pairs": True}, "cpu"),
        (weights.pack_weight, CUDA_TILES, {"k": 8, "n": 8, "dtype": "float16"}, "cpu"),
        (cuda_rows.cast_rows, None, {"columns": 8, "out": RowFormat(8, "float16")}, "cuda"),
    ],
    ids=["attention", "rows", "weights", "weights for a GPU", "without tiles"],
)
def test_recipes_of_all_kinds(factory, geometry, given_options, device):
    recipe = KernelRecipe.of(factory, geometry, given_options)
    assert KernelRecipe.from_json(recipe.to_json()) == recipe
    assert recipe.device == device
    assert recipe.build().params


def test_a_kernel_is_built_once_with_its_variants():
    recipe = KernelRecipe.of(linear.linear, tiles.AVX2, {"k": 8, "n": 8})
    variants = (Variant((("group", 2),)),)
    assert recipe.build((), variants).same_as(KernelRecipe.from_json(recipe.to_json()).build((), variants))
    assert not tvm_ffi.structural_equal(recipe.build(), recipe.build((), variants))
    with pytest.raises(ValueError, match="there is no knob"):
        recipe.build((), (Variant((("other", 2),)),))


def test_what_can_be_tuned():
    recipe = KernelRecipe.of(linear.linear, tiles.AVX2, {"k": 8, "n": 8})
    assert recipe.version == linear.VERSION > 0
    assert recipe.space == linear.space(tiles.AVX2) and recipe.space.most > 1


def test_kernels_without_a_version_have_nothing_to_tune():
    recipe = KernelRecipe.of(gate.gate, tiles.AVX2, {"columns": 8, "activation": "gelu"})
    assert recipe.version == 0 and recipe.space == Space()


GOOD = json.loads(KernelRecipe.of(linear.linear, tiles.AVX2, {"k": 8, "n": 8, "x": RowFormat(8)}).to_json())


def changed(**parts):
    return json.dumps({**GOOD, **parts})


HOSTILE = {
    "nothing": "",
    "no JSON": "linear.linear",
    "a number": "1",
    "null": "null",
    "a list": "[]",
    "an empty object": "{}",
    "deep": "[" * 100_000,
    "a deep option": changed(options={}).replace("{}", '{"x":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a long number": changed(options={}).replace("{}", '{"k":' + "1" * 10_000 + "}"),
    "surrogates": changed(schedule="\ud800.linear"),
    **{
        f"schedule {name!r}": changed(schedule=name)
        for name in (
            *(
                "os.system",
                "linear.tvm.os.system",
                "..os.system",
                "tuning.search.propose",
                "builtins.eval",
                "linear.eval",
            ),
            *("", ".", "linear", "linear.", ".linear", "linear.linear.linear", "linear.other", "linear.LINEAR"),
            *("linear.__init__", "linear.__doc__", "linear.__loader__", "linear.__class__", "__init__.linear"),
            *("linear.__builtins__", "linear.by_rows", "linear.space", "linear.Product", "linear._fp32_step"),
            *("linear.VERSION", "linear.T", "linear_amx.Operands", "attention.fits", "linear/../linear.linear"),
            *(1, None, True, ["linear.linear"], {"linear": 1}),
        )
    },
    **{
        f"tiles {value!r}"[:60]: changed(tiles=value)
        for value in (
            *(1, "AVX2", [], {}, {"lanes": 8}, {**GOOD["tiles"], "lanes": "8"}, {**GOOD["tiles"], "lanes": 8.0}),
            *({**GOOD["tiles"], "amx": 1}, {**GOOD["tiles"], "row_tile": None}, {**GOOD["tiles"], "other": 1}, None),
            {"row_tile": "1", "col_tile": 128, "query_tile": 64},
        )
    },
    **{
        f"options {value!r}"[:60]: changed(options=value)
        for value in (
            *(1, None, [], "k", {}, {"k": 8}, {"k": 8, "n": 8, "other": 1}, {"k": 8, "n": 8, "tiles": 1}),
            *({"k": 8, "n": 8, "x": {"width": 8}}, {"k": 8, "n": 8, "x": {"width": "8", "dtype": "float32"}}),
            *(
                {"k": 8, "n": 8, "x": {"width": 8, "dtype": 1}},
                {"k": 8, "n": 8, "x": {"width": 8, "dtype": None, "a": 1}},
            ),
            *({"k": 8, "n": 8, "x": [{"a": 1}]}, {"k": 8, "n": 8, "x": {}}),
        )
    },
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no kernel of this turbo_tvm: "):
        KernelRecipe.from_json(text)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        plain.filter(lambda v: not isinstance(v, tuple | RowFormat)),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_other_text_is_refused(value):
    for text in (json.dumps(value), changed(schedule=value), changed(tiles=value)):
        with pytest.raises(ValueError, match="no kernel of this turbo_tvm: "):
            KernelRecipe.from_json(text)


def with_a_version() -> dict[str, KernelRecipe]:
    """A kernel of each family that can be tuned."""
    row, narrow = RowFormat(768, BF16), RowFormat(256, BF16)
    product = {"k": 768, "n": 3000, "activation": "gelu", "residual": True}
    norm = {"n": 768, "eps": 1e-5, "residual": True}
    embedding = {"hidden": 768, "tables": 3, "norm_eps": 1e-5}
    made = {
        "linear.linear": (tiles.AVX512, {**product, "norm_eps": 1e-5}),
        "linear_amx.linear": (tiles.AMX, {**product, "norm_eps": 1e-5, "x": row, "out": RowFormat(3008, BF16)}),
        "attention.attention": (tiles.AVX512, {**HEADS, "position_bias": True}),
        "attention_amx.attention": (tiles.AMX, {**HEADS, "x": row, "out": narrow}),
        "normalization.norm": (tiles.AVX512, norm),
        "normalization.l2_normalize": (tiles.AVX512, {"n": 768}),
        "embedding.embedding": (tiles.AVX512, embedding),
        "pooling.pool": (tiles.AVX512, {"hidden": 768, "mode": "mean"}),
        "cuda.linear.linear": (CUDA_TILES, {**product, "x": RowFormat(768, "float16")}),
        "cuda.attention.attention": (CUDA_TILES, {**HEADS, "position_bias": True}),
        "cuda.normalization.norm": (None, norm),
        "cuda.embedding.embedding": (None, embedding),
        "cuda.softmax.softmax": (None, {"n": 768}),
        "cuda.pooling.pool": (None, {"hidden": 768, "mode": "mean"}),
        "cuda.gate.gate": (None, {"columns": 768, "activation": "gelu"}),
        "cuda.rows.cast_rows": (None, {"columns": 768, "out": RowFormat(768, "float16")}),
        "cuda.rotary.rotary": (
            None,
            {"columns": 768, "head_dim": 64, "dims": 64, "positions": 512, "spans": ((0, 12),)},
        ),
    }
    return {name: KernelRecipe(name, kind, tuple(sorted(chosen.items()))) for name, (kind, chosen) in made.items()}


def fingerprint(recipe: KernelRecipe) -> dict[str, object]:
    """What the file holds of a kernel; its hash is the same in every process."""
    return {"version": recipe.version, "hash": f"{tvm_ffi.structural_hash(recipe.build()) & (1 << 64) - 1:016x}"}


def fingerprints() -> dict[str, dict[str, object]]:
    """Of every family; made in a process of its own: what ran before in one can change hashes of AMX kernels."""
    return {name: fingerprint(recipe) for name, recipe in with_a_version().items()}


@pytest.fixture(scope="module")
def now() -> dict[str, dict[str, object]]:
    done = subprocess.run([sys.executable, __file__, "print"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", list(with_a_version()))
def test_a_kernel_that_changed_has_another_version(name, now):
    """Logs of the tuner hold for a version: what they were measured on must be what is built."""
    kept, found = json.loads(GOLDEN.read_text()).get(name, {}), now[name]
    module = name.rpartition(".")[0].replace(".", "/")
    if kept and kept["version"] == found["version"] and kept["hash"] != found["hash"]:
        pytest.fail(
            f"the kernel {name} changed, so that tuning logs of it no longer hold: raise VERSION in "
            f"schedules/{module}.py, then run `python {Path(__file__).name}` beside this file"
        )
    assert kept == found, f"VERSION of {name} changed: run `python {Path(__file__).name}` beside this file"


def test_every_family_that_can_be_tuned_is_kept():
    found = pkgutil.walk_packages(schedules.__path__, "turbo_tvm.schedules.")
    modules = [importlib.import_module(item.name) for item in found if not item.ispkg]
    names = {m: m.__name__.removeprefix("turbo_tvm.schedules.").removeprefix("cpu.") for m in modules}
    tuned = {names[m] for m in modules if hasattr(m, "VERSION")}
    spaces = {names[m] for m in modules if hasattr(m, "space")}
    assert tuned == {name.rpartition(".")[0] for name in with_a_version()}
    assert spaces == tuned, "a space has a version"
    assert set(json.loads(GOLDEN.read_text())) == set(with_a_version())


if __name__ == "__main__":
    text = json.dumps(fingerprints(), indent=2, sort_keys=True)
    if sys.argv[1:] == ["print"]:
        print(text)
    else:
        GOLDEN.write_text(text + "\n")
