"""Names of inputs: what transformers calls them, and what a manifest calls their kind."""

from __future__ import annotations

from typing import get_args

import pytest

from turbo_tvm.artifact import manifest
from turbo_tvm.ops.inputs import InputKind, kind_of


@pytest.mark.parametrize("kind", InputKind)
def test_a_name_stands_for_one_kind(kind):
    assert kind_of(kind.parameter) is kind


def test_names():
    assert [kind.parameter for kind in (InputKind.TOKEN_IDS, InputKind.PIXELS)] == ["input_ids", "pixel_values"]
    with pytest.raises(KeyError):
        kind_of("labels")


def test_manifests_know_the_kinds_of_imported_models():
    assert {kind.value for kind in InputKind if kind is not InputKind.PIXELS} <= set(get_args(manifest.InputKind))
