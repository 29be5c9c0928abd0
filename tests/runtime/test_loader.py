"""`turbo_tvm.load`: what it needs, what it refuses, and what it costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import turbo_tvm
from turbo_tvm.artifact import file as artifact
from turbo_tvm.errors import ArtifactError, TurboError
from turbo_tvm.runtime.device import library


@pytest.fixture(scope="module")
def saved(served, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "bert.turbo"
    served("bert").compiled.save(path)
    return path


@pytest.fixture
def changed(saved, tmp_path, monkeypatch):
    """`changed(**fields)`: the artifact with other fields in its manifest; its code must not be touched."""
    monkeypatch.setattr(library, "load_library", lambda _: pytest.fail("the code was loaded"))

    def make(**fields: object) -> Path:
        opened = artifact.read(saved)
        path = tmp_path / "changed.turbo"
        artifact.write(path, replace(opened.manifest, members={}, **fields), opened.library, opened.weights)
        return path

    return make


def python(code: str, *args: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done


BLOCKED = """
import json, sys

processes = []
sys.addaudithook(lambda event, args: processes.append(event) if event in (
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork") else None)

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import turbo_tvm
answers = turbo_tvm.load(sys.argv[1]).run([[5, 6, 7], [8]])
heavy = ("turbo_tvm.passes", "turbo_tvm.schedules", "turbo_tvm.frontends")
rooms = [name for name in sys.modules if name.startswith(heavy)]
print(json.dumps({"processes": processes, "rooms": rooms, "answers": [a.tolist() for a in answers]}))
"""


def test_needs_neither_torch_nor_a_compiler_nor_any_program(served, saved, tmp_path):
    done = python(BLOCKED, saved, env={"PATH": "", "HOME": str(tmp_path)})
    seen = json.loads(done.stdout)
    assert seen["processes"] == [] and seen["rooms"] == []
    for got, want in zip(seen["answers"], served("bert").compiled.run([[5, 6, 7], [8]]), strict=True):
        np.testing.assert_allclose(np.array(got), want, rtol=0, atol=1e-6)


def test_other_version_of_tvm(changed):
    with pytest.raises(ArtifactError, match=r"compiled with TVM 0\.1\.2, this is TVM .*: install that version"):
        turbo_tvm.load(changed(tvm_version="0.1.2"))


def test_features_that_this_machine_lacks(saved, changed):
    target = artifact.read(saved).manifest.target
    path = changed(target=replace(target, name="cpu:other", mcpu="other", features=("avx999", *target.features)))
    with pytest.raises(ArtifactError, match=r"'cpu:other' \(other\), and this machine's CPU lacks avx999"):
        turbo_tvm.load(path)


def test_other_architecture(saved, changed):
    target = artifact.read(saved).manifest.target
    other = "aarch64" if target.triple_arch == "x86_64" else "x86_64"
    path = changed(target=replace(target, triple_arch=other, features=()))
    with pytest.raises(ArtifactError, match=f"the artifact was compiled for {other}"):
        turbo_tvm.load(path)


@pytest.mark.parametrize("threads", [0, 10_000, "many"])
def test_threads_are_checked_before_the_file_is_read(threads):
    with pytest.raises(TurboError, match="the number of threads must be a whole number"):
        turbo_tvm.load("missing.turbo", threads=threads)


def test_damage_is_found_before_code_is_loaded(saved, changed, tmp_path):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.turbo").write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged"):
        turbo_tvm.load(tmp_path / "damaged.turbo")
    (tmp_path / "damaged.turbo").write_bytes(saved.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="is cut short"):
        turbo_tvm.load(tmp_path / "damaged.turbo")


def test_the_file_may_go_once_it_is_loaded(served, saved, tmp_path):
    path = tmp_path / "model.turbo"
    path.write_bytes(saved.read_bytes())
    model = turbo_tvm.load(path)
    path.unlink()
    np.testing.assert_array_equal(model.run([[5, 6]])[0], served("bert").compiled.run([[5, 6]])[0])


MEASURED = """
import resource, sys
import turbo_tvm, turbo_tvm.runtime.loader, tvm
from turbo_tvm.runtime import executor, model

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident()
loaded = turbo_tvm.load(sys.argv[1])
loaded.run([[5, 6, 7]])
print(resident() - before, sum(w.nbytes for w in loaded._artifact.weights.values()))
"""


def test_memory_has_the_weights_once(tmp_path):
    """Resident memory grows by less than 1.3 times the weights, the first request included."""
    config = transformers.BertConfig(vocab_size=60_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.BertModel(config, add_pooling_layer=False)
    with torch.no_grad():  # any values but zeros, which a file system might not store
        model.embeddings.word_embeddings.weight.fill_(0.01)
    turbo_tvm.compile(model, progress=False).save(tmp_path / "large.turbo")
    grown_bytes, weight_bytes = map(int, python(MEASURED, tmp_path / "large.turbo").stdout.split())
    assert weight_bytes > 60_000_000
    assert grown_bytes < 1.3 * weight_bytes
