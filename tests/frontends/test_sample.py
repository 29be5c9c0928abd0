"""How far answers are from those of the source model."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.frontends.sample import ImageSample, Sample, spread_lengths

IDS = np.array([[5, 6, 7], [8, 0, 0]])
MASK = np.array([[1, 1, 1], [1, 0, 0]])
HIDDEN = np.arange(12, dtype=np.float32).reshape(2, 3, 2)


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(100, [100, 25]), (64, [64, 16]), (63, [63]), (1, [1]), (4096, [4096, 1024, 256, 64, 16])],
)
def test_lengths_are_spread_to_the_longest(longest, lengths):
    assert spread_lengths(longest) == lengths and sum(lengths) <= longest * 4 / 3


def test_arguments_of_the_call():
    assert list(Sample(IDS, MASK, {}).inputs) == ["input_ids", "attention_mask"]
    assert list(Sample(IDS, MASK, {}, IDS).inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert list(ImageSample(np.zeros((1, 3, 2, 2)), {}).inputs) == ["pixel_values"]


def test_differences_are_relative_to_the_largest_real_value():
    sample = Sample(IDS, MASK, {"hidden": HIDDEN, "pooled": HIDDEN[:, 0]})
    answers = {"hidden": HIDDEN.copy(), "pooled": HIDDEN[:, 0] + 0.6}
    answers["hidden"][0, 2, 1] += 0.7  # of 7, the largest of a token that is not padding
    assert sample.differences(answers) == {"hidden": pytest.approx(0.1), "pooled": pytest.approx(0.6 / 7)}


def test_padding_does_not_count():
    answers = HIDDEN.copy()
    answers[1, 1:] = np.nan
    assert Sample(IDS, MASK, {"hidden": HIDDEN}).differences({"hidden": answers}) == {"hidden": 0}


def test_what_is_no_number_is_no_agreement():
    answers = HIDDEN.copy()
    answers[0, 0, 0] = np.nan
    for sample in (Sample(IDS, MASK, {"hidden": HIDDEN}), ImageSample(IDS, {"hidden": HIDDEN})):
        assert not sample.differences({"hidden": answers})["hidden"] <= 1e9


def test_images_are_compared_whole():
    sample = ImageSample(np.zeros((2, 3, 2, 2)), {"hidden": HIDDEN})
    assert sample.differences({"hidden": HIDDEN + 1.1}) == {"hidden": pytest.approx(0.1)}


def test_outputs_of_zeros():
    assert ImageSample(IDS, {"out": np.zeros((2, 2))}).differences({"out": np.zeros((2, 2))}) == {"out": 0}
