"""The order of passes holds: a whole model becomes few composites, or the padded graph with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from transformers import BertConfig, BertModel
from tvm import relax

from turbo_tvm.compiler import pipeline
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.frontends.torch.sentence import SentenceEncoder
from turbo_tvm.passes import composite
from turbo_tvm.passes.hoist_weights import TRANSFORM
from turbo_tvm.passes.rewriter import Rewriter, is_call
from turbo_tvm.schedules.cpu.tiles import AVX512, CpuTiles

TILES = CpuTiles(lanes=4, row_tile=4, tile_units=3, col_tile=8)
LAYERS, MAX_LENGTH = 2, 24
GONE = ("multiply", "subtract", "where", "softmax", "matmul", "layer_norm", "gelu", "permute_dims", "reshape", "take")


def bert(layers: int = LAYERS, attention: str = "sdpa", **options) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_LENGTH,
        attn_implementation=attention,
    )
    return BertModel(config, add_pooling_layer=False, **options).eval()


class SumOverTokens(torch.nn.Module):
    """Mixes tokens in a way that no composite covers."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        return {"output": self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.sum(1)}


@pytest.fixture(scope="module")
def imported() -> Imported:
    return import_module(bert())


@pytest.fixture(scope="module")
def optimized(imported: Imported) -> pipeline.Optimized:
    return pipeline.optimize(imported.mod, TILES, MAX_LENGTH)


@pytest.fixture(scope="module")
def padded() -> Imported:
    return import_module(SumOverTokens(bert(layers=1)))


def values(mod: tvm.IRModule, name: str = "main") -> list[relax.Expr]:
    return [b.value for block in mod[name].body.blocks for b in block.bindings]


def composites(mod: tvm.IRModule, name: str = "main") -> list[str]:
    return [f.name for v in values(mod, name) if (f := composite.match(v)) is not None]


def operators(mod: tvm.IRModule, name: str = "main") -> list[str]:
    calls = [v for v in values(mod, name) if isinstance(v, relax.Call) and composite.match(v) is None]
    return [call.op.name.removeprefix("relax.").removeprefix("nn.") for call in calls]


def test_a_layer_is_five_composites_and_nothing_else(optimized):
    layer = ["linear", "attention", "linear", "linear", "linear"]
    assert composites(optimized.mod) == ["embedding", *layer * LAYERS]
    assert operators(optimized.mod) == []
    assert (optimized.layout, optimized.declined) == ("packed", ())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_mask_arithmetic_and_no_mask_is_left(attention, optimized):
    mod = optimized.mod
    if attention == "eager":
        mod = pipeline.optimize(import_module(bert(1, "eager")).mod, TILES, MAX_LENGTH).mod
    assert not set(operators(mod)) & set(GONE)
    assert "attention_mask" not in [p.name for p in mod["main"].params]
    assert len(composites(mod)) <= 1 + 6 * LAYERS


def test_inputs_are_packed_and_prepared_weights_follow(optimized):
    main = optimized.mod["main"]
    names = [p.name for p in main.params]
    inputs = ["input_ids", "token_type_ids", "position_ids", "cu_seqlens", "query_tiles"]
    assert names[: int(main.attrs["num_input"])] == inputs
    assert len(set(names)) == len(names)


def test_weights_are_prepared_outside_of_main(imported, optimized):
    assert set(composites(optimized.mod, TRANSFORM)) == {"pack_weight", "pack_bias"}
    assert len(optimized.mod[TRANSFORM].params) == len(imported.weights)
    assert not set(composites(optimized.mod)) & {"pack_weight", "pack_bias"}


def test_pooling_and_normalisation_are_packed_too():
    mod = pipeline.optimize(import_module(SentenceEncoder(bert(1), "mean", True)).mod, TILES, MAX_LENGTH).mod
    assert composites(mod)[-2:] == ["pool", "normalize"]
    assert operators(mod) == []


def test_rows_between_products_are_widened():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=1024
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    kernels = pipeline.optimize(import_module(model).mod, TILES, 512).kernels
    assert {"linear_16x1024_gelu_to1040", "linear_1024x16_norm_eps1e_12_residual_from1040"} <= {k.name for k in kernels}


def dtypes(mod: tvm.IRModule, name: str = "main") -> list[tuple[str, str]]:
    found = [(composite.match(v), v) for v in values(mod, name)]
    return [(fused.name, str(value.ty_args[0].dtype)) for fused, value in found if fused is not None]


def test_bf16_is_stored_between_composites_and_never_returned(imported, optimized):
    mod = pipeline.optimize(imported.mod, TILES, MAX_LENGTH, "bf16").mod
    assert composites(mod) == composites(optimized.mod)
    *inner, last = dtypes(mod)
    assert {dtype for _, dtype in inner} == {"uint16"} and last == ("linear", "float32")
    prepared = set(dtypes(mod, TRANSFORM))
    assert prepared == {("pack_weight", "int32"), ("pack_bias", "float32"), ("cast_weight", "uint16")}
    assert all("bf16" in k.name for k in pipeline.optimize(imported.mod, TILES, MAX_LENGTH, "bf16").kernels)


def test_bf16_in_a_padded_graph_is_for_the_products_only(padded):
    optimized = pipeline.optimize(padded.mod, TILES, MAX_LENGTH, "bf16")
    assert optimized.layout == "padded"
    found = dtypes(optimized.mod)
    assert {dtype for name, dtype in found if name == "cast_rows"} == {"uint16"}
    assert {dtype for name, dtype in found if name in ("linear", "norm", "tile_rows", "untile_rows")} == {"float32"}


def test_a_model_that_is_declined_stays_padded_with_the_reason(padded):
    optimized = pipeline.optimize(padded.mod, TILES, MAX_LENGTH)
    assert optimized.layout == "padded"
    (reason,) = optimized.declined
    assert reason.startswith("padding was not removed: ") and "relax.sum" in reason
    names = composites(optimized.mod)
    assert names.count("linear") == 6 and "attention" not in names
    assert names.count("tile_rows") >= names.count("untile_rows") == 7
    assert "attention_mask" in [p.name for p in optimized.mod["main"].params]
    assert operators(optimized.mod).count("sum") == 1


def test_the_imported_module_is_not_changed(padded):
    text = padded.mod.script()
    pipeline.optimize(padded.mod, TILES, MAX_LENGTH)
    assert padded.mod.script() == text


def test_optimizing_twice_gives_the_same(imported, optimized):
    again = pipeline.optimize(imported.mod, TILES, MAX_LENGTH)
    tvm.ir.assert_structural_equal(again.mod, optimized.mod)
    assert again.kernels == optimized.kernels


def test_deep_models_are_optimized(padded):
    """Passes that follow a value back to where it comes from must not recurse once per operator."""
    deep = _deepen(padded.mod, 400)
    assert pipeline.optimize(deep, TILES, MAX_LENGTH).layout == "padded"


def _deepen(mod: tvm.IRModule, times: int) -> tvm.IRModule:
    """The module with `times` negations after each LayerNorm: as deep as a model of many layers."""

    class Deepen(Rewriter):
        def rules(self):
            return (self._negate,)

        def _negate(self, call):
            if not is_call(call, "nn.layer_norm"):
                return None
            x = self.emit(call)
            for _ in range(times):
                x = self.emit(relax.op.negative(x))
            return x

    return Deepen(mod).run()


PACKED = [
    "00_normalize",
    "01_compose_operators",
    "02_fuse_attention",
    "03_fuse_pooling",
    "04_drop_mask",
    "05_remove_padding",
    "06_fuse_linear",
    "07_fuse_gate",
    "08_merge_qkv",
    "09_fuse_norm",
    "10_fuse_embedding",
    "11_widen_rows",
    "12_pack_weights",
    "13_hoist_weights",
]


def test_every_pass_writes_what_it_made(imported, tmp_path, monkeypatch):
    directory = tmp_path / "not yet there"
    monkeypatch.setenv("TURBO_TVM_DUMP_IR", str(directory))
    optimized = pipeline.optimize(imported.mod, TILES, MAX_LENGTH)
    assert sorted(p.stem for p in (directory / "packed").iterdir()) == PACKED
    assert "R.nn.attention" in (directory / "packed" / "00_normalize.py").read_text()
    assert "R.nn.attention" not in (directory / "packed" / "02_fuse_attention.py").read_text()
    assert (directory / "packed" / "13_hoist_weights.py").read_text() == optimized.mod.script(show_meta=False)


def test_bf16_is_a_pass_of_its_own(imported, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_TVM_DUMP_IR", str(tmp_path))
    pipeline.optimize(imported.mod, TILES, MAX_LENGTH, "bf16")
    names = [p.stem[3:] for p in sorted((tmp_path / "packed").iterdir())]
    assert names[names.index("fuse_embedding") + 1 :] == [
        "lower_precision",
        "widen_rows",
        "pack_weights",
        "hoist_weights",
    ]


def test_nothing_is_written_unless_asked(imported, tmp_path, monkeypatch):
    monkeypatch.delenv("TURBO_TVM_DUMP_IR", raising=False)
    monkeypatch.chdir(tmp_path)
    pipeline.optimize(imported.mod, TILES, MAX_LENGTH)
    assert list(tmp_path.iterdir()) == []


def test_built_parameters_and_buffers_are_those_that_main_takes(imported):
    from turbo_tvm.compiler import targets
    from turbo_tvm.schedules.cpu.tiles import cpu_tiles

    machine = targets.resolve("cpu")
    tiles = cpu_tiles(machine)
    optimized = pipeline.optimize(imported.mod, tiles, MAX_LENGTH)
    built = pipeline.build(optimized, imported.weights, machine, machine, tiles)
    main = optimized.mod["main"]
    assert list(built.parameters) == [p.name for p in main.params[int(main.attrs["num_input"]) :]]
    assert all(a.dtype == np.float32 for a in built.parameters.values())
    assert {b.shape[0] for b in built.memory.buffers} == {"token_tiles"}
    assert len(built.memory.steps) == sum(k.calls for k in optimized.kernels)
    assert [int(d) for d in built.outputs[0].shape.values[1:]] == [tiles.row_tile, 16]


def test_every_tile_geometry_gives_the_same_composites(imported, optimized):
    assert composites(pipeline.optimize(imported.mod, AVX512, MAX_LENGTH).mod) == composites(optimized.mod)
