"""What the kernels have in common: one setting each, and the default one where none is asked for."""

from __future__ import annotations

from functools import partial

import pytest
import tvm
import tvm_ffi

from turbo_tvm.schedules.cuda import attention, embedding, gate, linear, normalization, pooling, rotary, rows, softmax
from turbo_tvm.schedules.cuda.script import only_setting
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.common.space import Knob, Space, Variant

HEADS = {"heads": 2, "head_dim": 32, "scale": 0.2, "max_length": 8, "q": (192, 0), "k": (192, 64), "v": (192, 128)}
TURN = {"columns": 96, "head_dim": 32, "dims": 32, "positions": 8, "spans": ((0, 2),)}
FAMILIES = {  # module, schedule, positional arguments, options
    "linear": (linear, linear.linear, (CUDA_TILES,), {"k": 64, "n": 128}),
    "linear fp16": (linear, linear.linear, (CUDA_TILES,), {"k": 64, "n": 128, "x": RowFormat(64, "float16")}),
    "attention": (attention, attention.attention, (CUDA_TILES,), HEADS),
    "attention fp16": (attention, attention.attention, (CUDA_TILES,), HEADS | {"x": RowFormat(192, "float16")}),
    "norm": (normalization, normalization.norm, (), {"n": 300, "eps": 1e-5, "residual": True}),
    "softmax": (softmax, softmax.softmax, (), {"n": 300}),
    "embedding": (embedding, embedding.embedding, (), {"hidden": 300, "tables": 2, "norm_eps": 1e-5}),
    "mean": (pooling, pooling.pool, (), {"hidden": 40, "mode": "mean"}),
    "first": (pooling, pooling.pool, (), {"hidden": 40, "mode": "first"}),
    "gate": (gate, gate.gate, (), {"columns": 40, "activation": "silu"}),
    "rotary": (rotary, rotary.rotary, (), TURN),
    "cast_rows": (rows, rows.cast_rows, (), {"columns": 40, "out": RowFormat(40, "float16")}),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """(version, space, schedule that takes `variants`)."""
    module, schedule, tiles, options = FAMILIES[request.param]
    return module.VERSION, module.space(*tiles, **options), partial(schedule, *tiles, **options)


def test_the_default_setting_is_what_is_done_without_any(family):
    version, space, schedule = family
    assert version >= 1 and space.valid(space.default)
    usual = Variant(tuple(space.default.items()))
    tvm.ir.assert_structural_equal(schedule(), schedule(variants=(usual,)))


def test_another_setting_is_another_kernel(family):
    _, space, schedule = family
    others = [setting for setting in space.settings() if setting != space.default]
    assert bool(others) == bool(space.knobs)
    for setting in others[:1]:
        assert not tvm_ffi.structural_equal(schedule(), schedule(variants=(Variant(tuple(setting.items())),)))


def test_settings_that_do_not_exist(family):
    _, space, schedule = family
    with pytest.raises(ValueError, match="2 variants: a GPU kernel has one setting"):
        schedule(variants=(Variant((), 64), Variant()))
    with pytest.raises(ValueError, match="the last one is None"):
        schedule(variants=(Variant((), 64),))
    with pytest.raises(ValueError, match="there is no knob 'speed'"):
        schedule(variants=(Variant((("speed", 11),)),))
    for knob in space.knobs:
        with pytest.raises(ValueError, match=f"knob {knob.name} cannot be 3"):
            schedule(variants=(Variant(((knob.name, 3),)),))


def test_the_only_setting():
    space = Space((Knob("threads", (32, 64), 32, ""), Knob("rows", (1, 2), 2, "")))
    assert only_setting((), space) == {"threads": 32, "rows": 2}
    assert only_setting((Variant((("rows", 1),)),), space) == {"threads": 32, "rows": 1}
