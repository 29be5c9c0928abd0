"""What the kernels have in common: one setting each, and the default one where none is asked for."""

from __future__ import annotations

from functools import partial

import pytest
import sized_operators as sized
import tvm
import tvm_ffi

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Knob, Space, Variant
from turbo_tvm.schedules.cuda import attention, embedding, gate, linear, normalization, pooling, rotary, rows, softmax
from turbo_tvm.schedules.cuda.script import only_setting
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

HALF = "float16"
HEADS = {"heads": 2, "head_dim": 32, "max_length": 8, "columns": ((192, 0), (192, 64), (192, 128))}
TURN = {"columns": 96, "spans": ((0, 2),), "head_dim": 32, "dims": 32, "positions": 8}
FAMILIES = {  # module, name of the schedule, operator
    "linear": (linear, "linear", sized.linear(CUDA_TILES, 64, 128)),
    "linear fp16": (linear, "linear", sized.linear(CUDA_TILES, 64, 128, x=Operand.rows(64, HALF))),
    "attention": (attention, "attention", sized.attention(CUDA_TILES, **HEADS)),
    "attention fp16": (attention, "attention", sized.attention(CUDA_TILES, **HEADS, dtype=HALF)),
    "norm": (normalization, "norm", sized.norm(CUDA_TILES, 300, eps=1e-5, residual=True)),
    "normalize": (normalization, "l2_normalize", sized.l2_normalize(CUDA_TILES, 300)),
    "softmax": (softmax, "softmax", sized.softmax(CUDA_TILES, 300)),
    "embedding": (embedding, "embedding", sized.embedding(CUDA_TILES, 300, 2, norm_eps=1e-5)),
    "mean": (pooling, "pool", sized.pool(CUDA_TILES, 40, "mean")),
    "first": (pooling, "pool", sized.pool(CUDA_TILES, 40, "first")),
    "gate": (gate, "gate", sized.gate(CUDA_TILES, 40, "silu")),
    "rotary": (rotary, "rotary", sized.rotary(CUDA_TILES, **TURN)),
    "cast_rows": (rows, "cast_rows", sized.cast_rows(CUDA_TILES, 40, Operand.rows(40, HALF))),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """(version, space, schedule that takes `variants`)."""
    module, name, operator = FAMILIES[request.param]
    return module.VERSION, module.space(operator, CUDA_TILES), partial(getattr(module, name), operator, CUDA_TILES)


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
