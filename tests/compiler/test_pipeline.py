"""The order of passes holds: a whole model becomes few operators, or the padded graph with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from operators import names_of, operators_of, others_of
from transformers import BertConfig, BertModel
from tvm import relax

from turbo_tvm.compiler import lowering, pipeline
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.frontends.torch.sentence import SentenceEncoder
from turbo_tvm.ops.entry import ENCODE, TRANSFORM_WEIGHTS
from turbo_tvm.ops.inputs import Inputs, num_input
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
    """Mixes tokens in a way that no operator covers."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        return {"output": self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.sum(1)}


@pytest.fixture(scope="module")
def imported(shared) -> Imported:
    return shared.imported("bert of test_pipeline", bert)


@pytest.fixture(scope="module")
def optimized(imported: Imported) -> pipeline.Optimized:
    return pipeline.optimize(imported.mod, TILES, MAX_LENGTH)


@pytest.fixture(scope="module")
def padded(shared) -> Imported:
    return shared.imported("sum of test_pipeline", lambda: SumOverTokens(bert(layers=1)))


def names(mod: tvm.IRModule, name: str = ENCODE) -> list[str]:
    """Our operators that a function calls, in order."""
    return names_of(mod, name)


def left_to_tvm(mod: tvm.IRModule, name: str = ENCODE) -> list[str]:
    """Relax operators that a function calls."""
    return others_of(mod, name)


def test_a_layer_is_five_operators_and_nothing_else(optimized):
    layer = ["linear", "attention", "linear", "linear", "linear"]
    assert names(optimized.mod) == ["embedding", *layer * LAYERS]
    assert left_to_tvm(optimized.mod) == []
    assert (optimized.layout, optimized.declined) == ("packed", ())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_mask_arithmetic_and_no_mask_is_left(attention, optimized):
    mod = optimized.mod
    if attention == "eager":
        mod = pipeline.optimize(import_module(bert(1, "eager")).mod, TILES, MAX_LENGTH).mod
    assert not {name.split(".")[-1] for name in left_to_tvm(mod)} & set(GONE)
    assert Inputs.of(mod[ENCODE]).attention_mask is None
    assert len(names(mod)) <= 1 + 6 * LAYERS


def test_inputs_are_packed_and_prepared_weights_follow(optimized):
    function = optimized.function
    parameters = [p.name for p in function.params]
    inputs = ["input_ids", "token_type_ids", "position_ids", "cu_seqlens", "query_tiles"]
    assert parameters[: num_input(function)] == inputs
    assert len(set(parameters)) == len(parameters)


def test_weights_are_prepared_outside_of_the_function(imported, optimized):
    assert set(names(optimized.mod, TRANSFORM_WEIGHTS)) == {"pack_weight", "pack_bias"}
    assert len(optimized.mod[TRANSFORM_WEIGHTS].params) == len(imported.weights)
    assert not set(names(optimized.mod)) & {"pack_weight", "pack_bias"}


def test_pooling_and_normalisation_are_packed_too():
    mod = pipeline.optimize(import_module(SentenceEncoder(bert(1), "mean", True)).mod, TILES, MAX_LENGTH).mod
    assert names(mod)[-2:] == ["pool", "normalize"]
    assert left_to_tvm(mod) == []


def test_rows_between_products_are_widened():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=1024
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    kernels = pipeline.optimize(import_module(model).mod, TILES, 512).kernels
    assert {"linear_16x1024_gelu_to1040", "linear_1024x16_norm_eps1e_12_residual_from1040"} <= {k.name for k in kernels}


def dtypes(mod: tvm.IRModule, name: str = ENCODE) -> list[tuple[str, str]]:
    return [(operator.NAME, str(operator.out.dtype)) for operator in operators_of(mod, name=name)]


def test_bf16_is_stored_between_operators_and_never_returned(imported, optimized):
    mod = pipeline.optimize(imported.mod, TILES, MAX_LENGTH, "bf16").mod
    assert names(mod) == names(optimized.mod)
    *inner, last = dtypes(mod)
    assert {dtype for _, dtype in inner} == {"uint16"} and last == ("linear", "float32")
    prepared = set(dtypes(mod, TRANSFORM_WEIGHTS))
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
    called = names(optimized.mod)
    assert called.count("linear") == 6 and "attention" not in called
    assert called.count("tile_rows") >= called.count("untile_rows") == 7
    assert Inputs.of(optimized.mod[ENCODE]).attention_mask is not None
    assert left_to_tvm(optimized.mod).count("relax.sum") == 1


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

    return Deepen(mod, ENCODE).run()


PACKED = [
    "canonicalize",
    "compose_operators",
    "fuse_attention",
    "fuse_pooling",
    "drop_mask",
    "remove_padding",
    "fuse_linear",
    "fuse_gate",
    "merge_qkv",
    "fuse_norm",
    "fuse_embedding",
    "widen_rows",
    "pack_weights",
    "lift_transform_params",
    "check_kernels",
    "packed",  # all of them together
]


def dumps(directory: Path) -> dict[str, str]:
    """What every pass of the packed phase made, by its name, in the order in which they ran."""
    files = sorted((directory / "packed").iterdir())
    return {file.stem.split("_", 1)[1]: file.read_text() for file in files}


def test_every_pass_writes_what_it_made(imported, tmp_path, monkeypatch):
    directory = tmp_path / "not yet there"
    monkeypatch.setenv("TURBO_TVM_DUMP_IR", str(directory))
    optimized = pipeline.optimize(imported.mod, TILES, MAX_LENGTH)
    written = dumps(directory)
    assert list(written) == PACKED
    assert "R.nn.attention" in written["canonicalize"]
    assert "R.nn.attention" not in written["fuse_attention"]
    assert written["packed"].endswith(optimized.mod.script(show_meta=False))


def test_bf16_is_a_pass_of_its_own(imported, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBO_TVM_DUMP_IR", str(tmp_path))
    pipeline.optimize(imported.mod, TILES, MAX_LENGTH, "bf16")
    passes = list(dumps(tmp_path))
    before = PACKED.index("widen_rows")
    assert passes == [*PACKED[:before], "lower_precision", *PACKED[before:]]


def test_nothing_is_written_unless_asked(imported, tmp_path, monkeypatch):
    monkeypatch.delenv("TURBO_TVM_DUMP_IR", raising=False)
    monkeypatch.chdir(tmp_path)
    pipeline.optimize(imported.mod, TILES, MAX_LENGTH)
    assert list(tmp_path.iterdir()) == []


def test_built_parameters_and_buffers_are_those_that_the_function_takes(imported):
    from turbo_tvm.compiler import targets
    from turbo_tvm.schedules.cpu.tiles import cpu_tiles

    machine = targets.resolve("cpu")
    tiles = cpu_tiles(machine)
    optimized = pipeline.optimize(imported.mod, tiles, MAX_LENGTH)
    built = lowering.build(optimized, imported.weights, machine)
    function = optimized.function
    assert list(built.parameters) == [p.name for p in function.params[num_input(function) :]]
    assert all(a.dtype == np.float32 for a in built.parameters.values())
    assert {b.shape[0] for b in built.memory.buffers} == {"token_tiles"}
    assert len(built.memory.steps) == sum(k.calls for k in optimized.kernels)
    assert [int(d) for d in built.outputs[0].shape.values[1:]] == [tiles.row_tile, 16]


def test_every_tile_geometry_gives_the_same_names(imported, optimized):
    assert names(pipeline.optimize(imported.mod, AVX512, MAX_LENGTH).mod) == names(optimized.mod)
