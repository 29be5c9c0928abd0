"""The artifact: what is written comes back, what is damaged is refused, and a failed save harms nothing."""

import errno
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.artifact import file as artifact
from turbo_tvm.artifact import sealed_zip
from turbo_tvm.artifact.file import read, write
from turbo_tvm.artifact.manifest import (
    FORMAT_VERSION,
    Manifest,
    OutputSpec,
    ParameterSpec,
    RequestLimits,
    TargetSpec,
    TensorSpec,
)
from turbo_tvm.errors import ArtifactError

LIBRARY = bytes(range(256)) * 3
TOKENIZER = json.dumps({"model": {"vocab": {"é": 0, "字": 1}}}, ensure_ascii=False)


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "packed": rng.standard_normal((2, 3, 16)).astype("float32"),  # 384 bytes: no gap
        "bias": rng.standard_normal(2).astype("float32"),
        "scale": np.float16(0.5).reshape(()),
        "ids": rng.integers(-9, 9, (3, 5)),
        "mask": np.array([True, False, True]),
        "codes": rng.integers(-128, 127, (7, 7), "int8"),
    }


def _manifest(weights):
    return Manifest(
        turbo_version="0.1.0",
        tvm_version="0.27.0",
        name="tiny",
        model_type="bert",
        entry="encode",
        target=TargetSpec("cpu", "x86_64", "znver4"),
        inputs=(TensorSpec("ids", "int32", "token_ids"),),
        outputs=(OutputSpec("hidden", "token", 96),),
        request_limits=RequestLimits(max_length=512, vocab_size=1003),
        parameters=tuple(ParameterSpec(n, w.shape, w.dtype.name) for n, w in weights.items()),
    )


def _save(path, seed=0, tokenizer=TOKENIZER):
    weights = _weights(seed)
    return write(path, _manifest(weights), LIBRARY, weights, tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good artifact."""
    path = tmp_path_factory.mktemp("whole") / "whole.turbo"
    _save(path)
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """Asserts that some bytes are no artifact, with a message that says so."""

    def check(data, match="is damaged"):
        path = tmp_path / "bad.turbo"
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)

    return check


# What is written comes back


@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_round_trip(tmp_path, tokenizer):
    path = tmp_path / "tiny.turbo"
    written = _save(path, tokenizer=tokenizer)
    found = read(path)
    assert (found.manifest, found.library, found.tokenizer, found.path) == (written, LIBRARY, tokenizer, path)
    assert list(found.weights) == [spec.name for spec in written.parameters]
    for name, weight in _weights().items():
        assert found.weights[name].dtype == weight.dtype
        np.testing.assert_array_equal(found.weights[name], weight)


def test_members_and_their_sums(tmp_path):
    path = tmp_path / "tiny.turbo"
    members = _save(path).members
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["library.so", "weights.safetensors", "tokenizer.json", "manifest.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        for name, member in members.items():
            data = archive.read(name)
            assert (member.bytes, member.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    listing = subprocess.run([sys.executable, "-m", "zipfile", "-l", path], capture_output=True, text=True)
    assert listing.returncode == 0 and "weights.safetensors" in listing.stdout


def test_safetensors_reads_the_weights(tmp_path):
    path = tmp_path / "tiny.turbo"
    _save(path)
    with zipfile.ZipFile(path) as archive:
        found = safetensors.numpy.load(archive.read("weights.safetensors"))
    for name, weight in _weights().items():
        np.testing.assert_array_equal(found.pop(name), weight)
    assert all(name.startswith("__padding__.") for name in found)


def test_weights_are_aligned_private_and_writable(tmp_path):
    path = tmp_path / "tiny.turbo"
    _save(path)
    before = path.read_bytes()
    found = read(path)
    for weight in found.weights.values():
        assert weight.ctypes.data % 64 == 0 and not weight.flags.owndata and weight.flags.c_contiguous
        weight[...] = 1
    assert path.read_bytes() == before
    np.testing.assert_array_equal(read(path).weights["packed"], _weights()["packed"])


def test_weights_outlive_the_artifact_and_the_file(tmp_path):
    path = tmp_path / "tiny.turbo"
    _save(path)
    weight = read(path).weights["packed"]
    _save(path, seed=1)
    np.testing.assert_array_equal(weight, _weights()["packed"])
    path.unlink()
    np.testing.assert_array_equal(weight, _weights()["packed"])


def test_equal_input_gives_equal_bytes(tmp_path, whole):
    weights = {name: weight.copy("F") for name, weight in reversed(_weights().items())}
    write(tmp_path / "other.turbo", _manifest(_weights()), LIBRARY, weights, TOKENIZER)
    assert (tmp_path / "other.turbo").read_bytes() == whole


def test_an_artifact_can_be_saved_again_over_itself(tmp_path, whole):
    path = tmp_path / "tiny.turbo"
    path.write_bytes(whole)
    found = read(path)
    write(path, found.manifest, found.library, found.weights, found.tokenizer)
    assert path.read_bytes() == whole


def test_large_members_get_64_bit_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed_zip, "ZIP64_FROM", 1)
    path = tmp_path / "tiny.turbo"
    _save(path)
    assert all(weight.ctypes.data % 64 == 0 for weight in read(path).weights.values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_no_weights_at_all(tmp_path):
    path = tmp_path / "tiny.turbo"
    write(path, _manifest({}), b"code", {})
    assert read(path).weights == {}


def test_save_follows_links_and_the_umask(tmp_path):
    (tmp_path / "link.turbo").symlink_to(tmp_path / "real.turbo")
    _save(tmp_path / "link.turbo")
    assert (tmp_path / "link.turbo").is_symlink() and not (tmp_path / "real.turbo").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "real.turbo").stat().st_mode & 0o777 == 0o666 & ~umask


# What does not fit together is not written


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"other": np.zeros(3, "float32")}, "not in both: other, w"),
        ({"w": np.zeros(4, "float32")}, r"'w' is float32\[4\], the manifest has float32\[3\]"),
        ({"w": np.zeros(3, "float64")}, r"'w' is float64\[3\]"),
        ({"w": np.zeros(3, ">f4")}, "'w' is >f4"),
    ],
)
def test_weights_other_than_the_manifest_says(tmp_path, weights, message):
    manifest = _manifest({"w": np.zeros(3, "float32")})
    with pytest.raises(ArtifactError, match=message):
        write(tmp_path / "tiny.turbo", manifest, LIBRARY, weights)
    assert not list(tmp_path.iterdir())


def test_names_and_texts_that_cannot_be_stored(tmp_path):
    weights = {"__metadata__": np.zeros(3, "float32")}
    with pytest.raises(ArtifactError, match="two leading underscores"):
        write(tmp_path / "tiny.turbo", _manifest(weights), LIBRARY, weights)
    with pytest.raises(ArtifactError, match="tokenizer: its text is not valid Unicode"):
        _save(tmp_path / "tiny.turbo", tokenizer='"\ud800"')
    with pytest.raises(ArtifactError, match="row_tile"):
        write(tmp_path / "tiny.turbo", replace(_manifest({}), row_tile=0), LIBRARY, {})
    with pytest.raises(ArtifactError, match="null byte"):
        _save(tmp_path / "a\0b")
    assert not list(tmp_path.iterdir())


# A failed save harms nothing


@pytest.fixture
def occupied(tmp_path, whole):
    """A path with a good artifact; afterwards it is still there, alone."""
    path = tmp_path / "occupied.turbo"
    path.write_bytes(whole)
    yield path
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


class _FullDisk:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 10, 200, 900, 1500, 3000, 4000, 4700])
def test_disk_full(occupied, monkeypatch, whole, room):
    assert room < len(whole)

    def full(*how):
        return _FullDisk(open(*how), room)

    monkeypatch.setattr(artifact, "open", full, raising=False)
    with pytest.raises(ArtifactError, match=r"occupied.turbo' \(No space left on device\): the disk is full: free"):
        _save(occupied, seed=1)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(("code", "advice"), [(errno.EDQUOT, "quota"), (errno.EIO, "elsewhere")])
def test_failure_at_the_end(occupied, monkeypatch, call, code, advice):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArtifactError, match=advice):
        _save(occupied, seed=1)


def test_interrupted(occupied, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _save(occupied, seed=1)


LIMITED = """
import resource, sys
sys.path[:0] = sys.argv[2:]
from test_file import _save
from turbo_tvm.errors import ArtifactError
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    _save(sys.argv[1], seed=1)
except ArtifactError as error:
    print(error)
"""


def test_real_limit_on_the_size_of_files(occupied):
    command = [sys.executable, "-c", LIMITED, occupied, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "(File too large): files may not be this large here" in done.stdout


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ArtifactError, match=r"No such file or directory.*create the directory first"):
        _save(tmp_path / "missing" / "tiny.turbo")
    with pytest.raises(ArtifactError, match=r"Not a directory.*inside a directory"):
        _save(tmp_path / "file" / "tiny.turbo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"Is a directory.*the path of a file"):
        _save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_directory_without_permission(tmp_path, monkeypatch):
    # Raised by hand: tests may run as root, whom no mode stops.
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(artifact, "open", refuse, raising=False)
    with pytest.raises(ArtifactError, match=r"Permission denied.*a directory that you can write to"):
        _save(tmp_path / "tiny.turbo")


# What is damaged is refused


def test_every_single_byte_is_covered(tmp_path, whole):
    """No byte can be changed unnoticed, padding and zip headers included."""
    path = tmp_path / "flipped.turbo"
    path.write_bytes(whole)
    bits = random.Random(0)
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bits.randrange(8)]), position)
            with pytest.raises(ArtifactError):
                read(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert read(path).library == LIBRARY


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_noticed(tmp_path_factory, whole, data):
    first = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(0, 40))
    patch = data.draw(st.binary(max_size=40))
    damaged = whole[:first] + patch + whole[first + length :]
    if damaged == whole:
        return
    path = tmp_path_factory.getbasetemp() / "damaged.turbo"
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError):
        read(path)


def _boundaries(data):
    """Where a part of the zip starts or ends."""
    found = {0, 1, 3, 4, 22, 30, len(data) - 1, len(data) - 64, len(data) - sealed_zip.SEAL_BYTES}
    for signature in (b"PK\3\4", b"PK\1\2", b"PK\5\6"):
        position = data.find(signature)
        while position >= 0:
            found |= {position, position + 4, position + 22, position + 30, position + 46}
            position = data.find(signature, position + 1)
    return sorted(cut for cut in found if cut < len(data))


def test_cut_short(refused, whole):
    for cut in {*_boundaries(whole), *random.Random(1).sample(range(len(whole)), 300)}:
        refused(whole[:cut], "it is empty" if not cut else "cut short|not a zip")


def test_bytes_added(refused, whole):
    refused(whole + b"\0", "cut short")
    refused(b"\0" + whole, "not a zip")
    refused(whole + whole)


def test_not_a_zip(refused):
    refused(b"", "it is empty; it is damaged")
    refused(b"\x7fELF" + bytes(5000), "not a zip file.*compile the model again")
    refused(b"PK\3\4" + bytes(5000), "cut short")


def test_not_a_file(tmp_path):
    with pytest.raises(ArtifactError, match="a directory or a device: give the path of an artifact's file"):
        read(tmp_path)
    with pytest.raises(ArtifactError, match=r"No such file or directory\): check the path"):
        read(tmp_path / "missing.turbo")
    with pytest.raises(ArtifactError, match="null byte"):
        read(tmp_path / "a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="a device"):
        read(tmp_path / "pipe")


# A file that was made on purpose: the seal and the sums are right, the rest is not


def _sealed(path, members, aligned, compression):
    """A zip of `members`, (name, bytes) pairs, with a valid seal where its structure lets one be computed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            if aligned:
                sealed_zip.write_member(archive, name, len(data), [data])
            else:
                archive.writestr(name, data, compression)
        archive.comment = sealed_zip.empty_seal()
    _reseal(path)


def _reseal(path):
    with open(path, "r+b") as file:
        try:
            sealed_zip.write_seal(file)
        except ArtifactError:
            return


def _parts(whole, tmp_path):
    path = tmp_path / "parts.turbo"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def crafted(tmp_path, whole):
    """Asserts that members, changed by `change(parts, plain manifest)` and sealed again, are refused."""

    def check(change, match, aligned=True, compression=zipfile.ZIP_STORED):
        parts = _parts(whole, tmp_path)
        plain = json.loads(parts["manifest.json"])
        members = change(parts, plain) or list(parts.items())
        path = tmp_path / "crafted.turbo"
        _sealed(path, members, aligned, compression)
        with pytest.raises(ArtifactError, match=match):
            read(path)

    return check


def _with_manifest(parts, plain):
    return list((parts | {"manifest.json": json.dumps(plain).encode()}).items())


@pytest.mark.parametrize("name", ["library.so", "weights.safetensors", "tokenizer.json", "manifest.json"])
def test_missing_member(crafted, name):
    def drop(parts, _):
        del parts[name]

    crafted(drop, f"{name}'? is missing|it has no {name}")


@pytest.mark.parametrize("name", ["extra.txt", "../../etc/passwd", "/library.so", "LIBRARY.SO", "x" * 60_000, "ü"])
def test_unexpected_member(crafted, name):
    def add(parts, plain):
        plain["members"][name] = {"sha256": hashlib.sha256(b"hello").hexdigest(), "bytes": 5}
        return _with_manifest({**parts, name: b"hello"}, plain)

    crafted(add, "unexpected member")


def test_member_that_the_manifest_does_not_list(crafted):
    def unlist(parts, plain):
        del plain["members"]["tokenizer.json"]
        return _with_manifest(parts, plain)

    crafted(unlist, "unexpected member 'tokenizer.json'")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(crafted):
    crafted(lambda parts, _: [*parts.items(), ("library.so", b"other")], "member 'library.so' twice")


def test_compressed_member(crafted):
    crafted(lambda parts, _: None, "is compressed", aligned=False, compression=zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1])
def test_other_format_version(crafted, version):
    # Other versions may have other fields and members.
    def change(parts, plain):
        return _with_manifest({**parts, "costs.json": b"{}"}, {"format_version": version, "turbo_version": "9.9"})

    crafted(change, f"format version {version} .*9.9.*reads version {FORMAT_VERSION}")


def test_wrong_field(crafted):
    crafted(lambda parts, plain: _with_manifest(parts, plain | {"row_tile": -1}), "row_tile must be at least 1")


@pytest.mark.parametrize("change", [{"bytes": 1}, {"sha256": "0" * 64}])
def test_wrong_sum(crafted, change):
    def edit(parts, plain):
        plain["members"]["library.so"].update(change)
        return _with_manifest(parts, plain)

    crafted(edit, "'library.so' has not the size and sha256 in the manifest")


def _summed(parts, plain, name, data):
    plain["members"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return _with_manifest(parts | {name: data}, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda specs: specs[0].update(name="absent"), "'absent' of the manifest is missing from"),
        (
            lambda specs: specs[0].update(shape=[16, 3, 2]),
            r"'packed' is \('F32', \[16, 3, 2\]\) in the manifest",
        ),
        (lambda specs: specs[0].update(shape=[2**40] * 9), "'packed' is"),
        (lambda specs: specs[0].update(shape=[1] * 100), "'packed' is"),
        (lambda specs: specs[0].update(dtype="int32"), r"'packed' is \('I32'"),
        (lambda specs: specs.reverse(), "not those of the manifest in its order"),
        (lambda specs: specs.pop(), "not those of the manifest in its order"),
    ],
)
def test_parameters_other_than_the_weights(crafted, change, message):
    def edit(parts, plain):
        change(plain["parameters"])
        return _with_manifest(parts, plain)

    crafted(edit, message)


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 4) + b"{" * 4,
    ],
)
def test_weights_that_are_not_safetensors(crafted, weights):
    crafted(
        lambda parts, plain: _summed(parts, plain, "weights.safetensors", weights),
        "is not a JSON object|'packed' of the manifest is missing",
    )


def test_weights_cut_short_or_misaligned(crafted):
    def cut(parts, plain):
        return _summed(parts, plain, "weights.safetensors", parts["weights.safetensors"][:-64])

    crafted(cut, "misaligned or cut short")
    crafted(lambda parts, plain: None, "misaligned or cut short", aligned=False)


def test_tokenizer_that_is_not_text(crafted):
    crafted(lambda parts, plain: _summed(parts, plain, "tokenizer.json", b"\xff\xfe"), "is not UTF-8")


def _directory_fields(data):
    """The offset and format of each number in the zip's directory and in its end record."""
    position = data.find(b"PK\1\2")
    while position >= 0:
        for offset, form in (
            (8, "H"),
            (10, "H"),
            (20, "I"),
            (24, "I"),
            (28, "H"),
            (30, "H"),
            (32, "H"),
            (42, "I"),
        ):
            yield position + offset, form
        position = data.find(b"PK\1\2", position + 1)
    end = data.rfind(b"PK\5\6")
    for offset, form in ((4, "H"), (8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H")):
        yield end + offset, form


@pytest.mark.parametrize("value", [0, 1, 8, 40, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
def test_huge_and_overlapping_offsets(tmp_path, whole, value):
    """Every number in the zip's directory replaced, and the file sealed again where that still works."""
    path = tmp_path / "crafted.turbo"
    for position, form in _directory_fields(whole):
        data = bytearray(whole)
        struct.pack_into("<" + form, data, position, value & (0xFFFF if form == "H" else 0xFFFFFFFF))
        path.write_bytes(data)
        _reseal(path)
        try:
            found = read(path)
        except ArtifactError:
            continue
        # The numbers that nothing reads: versions, disks. What is used is what was written.
        assert found.library == LIBRARY and found.tokenizer == TOKENIZER


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_random_directories_never_crash(tmp_path_factory, whole, data):
    """Damage in the zip's headers, sealed again: refused, or harmless."""
    path = tmp_path_factory.getbasetemp() / "random.turbo"
    start = whole.find(b"PK\1\2")
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(start, len(whole) - sealed_zip.SEAL_BYTES - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    _reseal(path)
    try:
        found = read(path)
    except ArtifactError:
        return
    assert found.library == LIBRARY and found.tokenizer == TOKENIZER


# In bulk

MEASURED = """
import resource, sys
from turbo_tvm.artifact.file import read
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
found = read(sys.argv[1])
total = sum(float(weight.sum()) for weight in found.weights.values())
print(resident() - before, sum(weight.nbytes for weight in found.weights.values()))
"""


def test_resident_memory_has_the_weights_once(tmp_path):
    path = tmp_path / "large.turbo"
    weights = {f"w{i}": np.full((1024, 1024), i, "float32") for i in range(16)}
    write(path, _manifest(weights), LIBRARY, weights)
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    grown_bytes, weight_bytes = map(int, done.stdout.split())
    assert grown_bytes < 1.1 * weight_bytes
