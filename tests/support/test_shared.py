"""What a run shares: made once, whoever asks, and the same as what was made."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import onnx_models
import pytest
import tvm
from shared import Shared, opened, read_import, write_import

import turbo_tvm
from turbo_tvm.compiler import pipeline
from turbo_tvm.errors import TurboError
from turbo_tvm.frontends.importer import import_model
from turbo_tvm.schedules.cpu.tiles import BASELINE


def count(folder: Path) -> None:
    """Note beside the folder that it was made."""
    with (folder.parent / "log").open("a") as log:
        log.write("made\n")
    (folder / "file").write_text("content")


def ask(folder: Path) -> None:
    assert (Shared(folder).made("thing", count) / "file").read_text() == "content"


def test_a_thing_is_made_once_for_all_processes(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=ask, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_names_are_things(tmp_path):
    shared = Shared(tmp_path)
    assert shared.made("one", count) != shared.made("other", count)
    assert shared.made("one", count) == shared.made("one", count)


def test_what_cannot_be_made_is_an_error_for_everyone_and_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            Shared(tmp_path).made("thing", fail)
    assert not (Shared(tmp_path).made("thing", count) / "half").exists()


def test_an_import_is_read_as_it_was_written(tmp_path):
    """The same module, weights and kernels; a family whose graph holds constants."""
    wanted = import_model(onnx_models.build("t5"))
    write_import(wanted, tmp_path)
    got = read_import(tmp_path)
    tvm.ir.assert_structural_equal(got.mod, wanted.mod, map_free_vars=True)
    assert got.mod.script() == wanted.mod.script()
    for a, b in zip(got.weights, wanted.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert (got.name, got.request_limits, got.positions, got.inputs) == (
        wanted.name,
        wanted.request_limits,
        wanted.positions,
        wanted.inputs,
    )
    np.testing.assert_array_equal(got.samples[0].token_ids, wanted.samples[0].token_ids)
    kernels = [pipeline.optimize(each.mod, BASELINE, 64).kernels for each in (got, wanted)]
    assert kernels[0] == kernels[1]


def test_a_shared_model_is_what_compile_makes(served):
    """The same manifest and weights as those of a compile of its own."""
    own, ours = turbo_tvm.compile(served("bert").module, progress=False), served("bert").compiled
    assert ours.manifest.kernels == own.manifest.kernels and ours.manifest.buffers == own.manifest.buffers
    assert (ours.manifest.name, ours.manifest.request_limits, ours.threads) == (
        own.manifest.name,
        own.manifest.request_limits,
        own.threads,
    )
    requests = [[5, 6, 7], [8], [9, 10]]
    for got, wanted in zip(ours.run(requests), own.run(requests), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_model_for_another_machine_can_be_saved_alone(shared, served, tmp_path):
    path = shared.artifact("served bert", lambda: served("bert").module, target="cuda:sm_80")
    model = opened(path)
    model.save(tmp_path / "model.turbo")
    with pytest.raises(TurboError):
        model.run([[5, 6]])
