"""Knobs, the space of their settings, and which variant runs a batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Knob, Space, Variant, by_rows, checked

SMALL = Knob("small", (1, 2, 4), 2, "few values")
FLAG = Knob("flag", (0, 1), 0, "yes or no")
SPACE = Space((SMALL, FLAG))
UNEVEN = Space((SMALL, FLAG), valid=lambda setting: setting["small"] != 4 or setting["flag"] == 1)
R = 4  # rows of a tile


def test_a_default_that_is_no_value_is_refused():
    with pytest.raises(ValueError, match=r"knob small: its default 3 is none of its values \(1, 2\)"):
        Knob("small", (1, 2), 3, "")


def test_all_settings_once_and_the_default_among_them():
    settings = list(SPACE.settings())
    assert settings == [{"small": a, "flag": b} for a, b in itertools.product((1, 2, 4), (0, 1))]
    assert SPACE.most == len(settings) == 6
    assert SPACE.default == {"small": 2, "flag": 0} and SPACE.default in settings


def test_settings_that_do_not_fit_are_left_out():
    settings = list(UNEVEN.settings())
    assert len(settings) == 5 and {"small": 4, "flag": 0} not in settings
    assert UNEVEN.most == 6


def test_a_space_without_knobs_has_its_default_alone():
    assert list(Space().settings()) == [{}] and Space().most == 1 and Space().complete({}) == {}
    with pytest.raises(ValueError, match="there is no knob 'small'; there are none"):
        Space().complete({"small": 1})


def test_spaces_of_the_same_knobs_are_equal():
    assert SPACE == UNEVEN and Space((SMALL,)) != SPACE


def test_what_a_setting_leaves_open_is_the_default():
    assert SPACE.complete({}) == SPACE.default
    assert SPACE.complete({"flag": 1}) == {"small": 2, "flag": 1}
    assert SPACE.complete({"flag": 1, "small": 4}) == {"small": 4, "flag": 1}


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"other": 1}, "there is no knob 'other'; there are small, flag"),
        ({"small": 3}, "knob small cannot be 3; it is one of 1, 2, 4"),
        ({"small": "2"}, "knob small cannot be '2'"),
        ({"small": None}, "knob small cannot be None"),
        ({"small": [1]}, r"knob small cannot be \[1\]"),
        ({"small": 4}, r"the setting \{'small': 4, 'flag': 0\} does not fit this kernel"),
    ],
)
def test_settings_outside_of_the_space_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        UNEVEN.complete(setting)


def test_features_are_places_among_the_values():
    assert [SPACE.features(setting) for setting in SPACE.settings()] == [
        [float(i), float(j)] for i, j in itertools.product(range(3), range(2))
    ]


def variant(max_rows=None, **setting):
    return Variant(tuple(setting.items()), max_rows)


def test_without_variants_the_default_runs_everything():
    assert checked((), SPACE) == [(SPACE.default, None)]


def test_variants_are_completed_in_order():
    assert checked((variant(16, small=1), variant(64, flag=1), variant()), SPACE) == [
        ({"small": 1, "flag": 0}, 16),
        ({"small": 2, "flag": 1}, 64),
        ({"small": 2, "flag": 0}, None),
    ]


@pytest.mark.parametrize("bounds", [[16], [None, None], [None, 16], [64, 16, None], [16, 16, None], [16, None, None]])
def test_bounds_that_do_not_ascend_to_none_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds must ascend, the last one is None"):
        checked([variant(bound) for bound in bounds], SPACE)


def test_variants_outside_of_the_space_are_refused():
    with pytest.raises(ValueError, match="there is no knob 'other'"):
        checked((variant(16, other=1), variant()), SPACE)
    with pytest.raises(ValueError, match="knob small cannot be 3"):
        checked((variant(16), variant(small=3)), SPACE)


def which(variants):
    """A kernel that writes the knob `small` of the variant that runs, and the row tiles that it is told."""

    def body(setting):
        value = setting["small"]

        @T.inline
        def run(t, out):
            out[0] = value
            out[1] = T.cast(t, "int32")

        return run

    choose = by_rows(variants, SPACE, R, body)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out: T.Buffer((2,), "int32")):
        t = T.int64()
        x = T.match_buffer(x_arg, (t, R), "float32")  # noqa: F841  it brings t
        choose(t, out)

    return kernel


THREE = (variant(2 * R, small=1), variant(5 * R, small=4), variant(small=2))


@pytest.mark.parametrize(
    "variants,wanted",
    [
        ((), {0: 2, 1: 2, 100: 2}),
        ((variant(small=4),), {0: 4, 1: 4, 100: 4}),
        (THREE, {0: 1, 1: 1, 2: 1, 3: 4, 4: 4, 5: 4, 6: 2, 7: 2, 1000: 2}),
        # a bound within a row tile: a batch may fill that tile, so it is not for the variant
        ((variant(2 * R + 3, small=1), variant(small=4)), {2: 1, 3: 4}),
        ((variant(R - 1, small=1), variant(small=4)), {0: 1, 1: 4}),
    ],
    ids=["none", "one", "three", "within a tile", "below a tile"],
)
def test_a_batch_runs_the_variant_for_its_rows(run_kernel, variants, wanted):
    kernel = which(variants)
    got = {t: run_kernel(kernel, [np.zeros((t, R), "float32")], (2,), dtype="int32").tolist() for t in wanted}
    assert got == {t: [value, t] for t, value in wanted.items()}
