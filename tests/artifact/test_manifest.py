"""The manifest: a round trip keeps everything, and a wrong field is named."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.artifact.manifest import (
    FORMAT_VERSION,
    BufferSpec,
    CostSpec,
    ImageSpec,
    KernelSpec,
    Manifest,
    MemberSpec,
    OutputSpec,
    ParameterSpec,
    PooledToken,
    PositionRule,
    RequestLimits,
    TargetSpec,
    TensorSpec,
)
from turbo_tvm.errors import ArtifactError

IMAGE = {"channels": 3, "height": 224, "width": 230, "patch_height": 16, "patch_width": 16, "prefix": 1}

SMALL = Manifest(
    turbo_version="0.1.0",
    tvm_version="0.27.0",
    name="tiny",
    model_type="bert",
    entry="encode",
    target=TargetSpec("cpu", "x86_64", "znver4"),
    inputs=(TensorSpec("ids", "int32", "token_ids"),),
    outputs=(OutputSpec("last_hidden_state", "token", 96),),
    request_limits=RequestLimits(max_length=512, vocab_size=1003),
)
FULL = replace(
    SMALL,
    target=TargetSpec("cpu:x86-64-v3", "x86_64", "x86-64-v3", ("avx2", "fma"), ("sm_80",)),
    layout="padded",
    row_tile=12,
    query_tile=6,
    inputs=(TensorSpec("ids", "int32", "token_ids"), TensorSpec("cu", "int32", "cu_seqlens")),
    outputs=(OutputSpec("hidden", "token", 96), OutputSpec("score", "sequence", 1, squeeze=True)),
    primary="hidden",
    request_limits=RequestLimits(512, 1003, 2),
    positions=PositionRule("count_non_pad", 1, 1),
    buffers=(
        BufferSpec("qkv", ("row_tiles", "4", "2*batch*length"), "float32", 0, 1),
        BufferSpec("out", ("row_tiles", "4", "2*batch*length"), "float32", 1, 1, "qkv"),
    ),
    steps=("gemm",),
    parameters=(ParameterSpec("dense", (8, 12, 96)), ParameterSpec("scale", (), "float16")),
    kernels=(KernelSpec("gemm", "linear", 24, "n x 96 x 96", 18432.0, 0.5, 36864),),
    declined=("tanh pooler: no pattern",),
    source_parameters=123_456,
    costs={"a CPU; 2 threads": CostSpec("packed", (0.01, 0.0, 1e-7, 1e-4, 2e-4), (16,), error=0.02, points=20)},
    members={"library.so": MemberSpec("0" * 64, 10)},
)


CLASSIFIER = replace(SMALL, outputs=(OutputSpec("logits", "sequence", 2),), labels=("cat", "dog"))


@pytest.mark.parametrize("manifest", [SMALL, FULL, CLASSIFIER])
def test_round_trip(manifest):
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json().encode()) == manifest


def test_whole_numbers_serve_as_floats():
    plain = json.loads(FULL.to_json())
    plain["kernels"][0]["flops_per_token"] = 7
    flops = Manifest.from_json(json.dumps(plain)).kernels[0].flops_per_token
    assert type(flops) is float and flops == 7.0


# (path to the field, value put there, what the message has to say)
WRONG = [
    (["name"], 5, "field name must be a string, is 5"),
    (["row_tile"], 0, "field row_tile must be at least 1, is 0"),
    (["row_tile"], True, "field row_tile must be a 64-bit integer, is True"),
    (["row_tile"], 2**63, "field row_tile must be a 64-bit integer"),
    (["row_tile"], "12", "field row_tile must be a 64-bit integer, is '12'"),
    (["row_tile"], 12.0, "field row_tile must be a 64-bit integer"),
    (["precision"], "int4", "field precision must be one of fp32, bf16, fp16, is 'int4'"),
    (["precision"], ["fp32"], "field precision must be one of fp32, bf16"),
    (["layout"], None, "field layout must be one of packed, padded"),
    (["primary"], "logits", r"field primary must be one of the outputs \['hidden', 'score'\]"),
    (["target"], [], r"field target must be an object, is \[\]"),
    (["target", "triple_arch"], "riscv64", "field target.triple_arch must be one of x86_64, aarch64"),
    (["target", "features"], "avx2", "field target.features must be a list"),
    (["target", "features", 1], 7, r"field target.features\[1\] must be a string"),
    (["target", "architectures"], 7, "field target.architectures must be a list"),
    (["outputs", 1, "squeeze"], 1, r"field outputs\[1\].squeeze must be true or false"),
    (["outputs", 0, "dtype"], "float8", r"field outputs\[0\].dtype must be one of"),
    (["inputs", 1, "name"], "ids", "field inputs has the name 'ids' 2 times"),
    (["request_limits", "vocab_size"], 0, "field request_limits.vocab_size must be at least 1"),
    (["request_limits", "vocab_size"], -1, "field request_limits.vocab_size must be at least 0"),
    (["request_limits", "image"], 224, "field request_limits.image must be an object"),
    (
        ["request_limits", "image"],
        IMAGE | {"patch_width": 231},
        "field request_limits.image must be an image of at least one patch",
    ),
    (["request_limits", "image"], IMAGE, "field request_limits.max_length must be 197, an image's tokens, is 512"),
    (["positions", "pad_id"], -1, "field positions.pad_id must be at least 0"),
    (["parameters", 0, "shape", 1], 0, r"field parameters\[0\].shape\[1\] must be at least 1"),
    (["kernels", 0, "flops_per_token"], "9", r"field kernels\[0\].flops_per_token must be a finite number"),
    (["kernels", 0, "flops_per_pair"], float("inf"), r"kernels\[0\].flops_per_pair must be a finite number"),
    (
        ["kernels", 0, "flops_per_pair"],
        10**400,
        r"field kernels\[0\].flops_per_pair must be a 64-bit integer",
    ),
    (["members"], [], "field members must be an object"),
    (["members", "library.so"], 3, "field members.library.so must be an object"),
    (["members", "library.so", "bytes"], -1, "field members.library.so.bytes must be at least 0"),
    (["members", "library.so", "mode"], 1, "field members.library.so.mode is unknown"),
    (["colour"], "red", "field colour is unknown"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_wrong_field_is_named(path, value, message):
    plain = json.loads(FULL.to_json())
    inner = plain
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(json.dumps(plain))


def _fields(plain, path=()):
    if isinstance(plain, dict):
        for name, value in plain.items():
            yield (*path, name)
            yield from _fields(value, (*path, name))
    elif isinstance(plain, list):
        for index, value in enumerate(plain):
            yield from _fields(value, (*path, index))


@pytest.mark.parametrize(
    "path",
    [p for p in _fields(json.loads(FULL.to_json())) if p[:1] != ("members",) and not (p[0] == "costs" and len(p) == 2)],
)
def test_missing_field_is_named(path):
    plain = json.loads(FULL.to_json())
    inner = plain
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    with pytest.raises(ArtifactError, match=rf"{path[-1]} is missing"):
        Manifest.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000, b"[]", b"null", b"3", b"9" * 5000, b"{}"])
def test_not_a_manifest(text):
    with pytest.raises(ArtifactError, match="manifest"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (FORMAT_VERSION + 1, "a newer turbo_tvm"),
        (0, "another turbo_tvm"),
        ("1", "another"),
        (None, "another"),
    ],
)
def test_other_format_versions_are_named(version, advice):
    # A later format has fields of its own: the version is what the message must be about.
    plain = {"format_version": version, "turbo_version": "9.9.9", "shards": 4}
    with pytest.raises(
        ArtifactError, match=f"format version {version!r}.*9.9.9.*reads version {FORMAT_VERSION}.*use {advice}"
    ):
        Manifest.from_json(json.dumps(plain))


def test_version_of_another_type():
    plain = json.loads(SMALL.to_json()) | {"format_version": float(FORMAT_VERSION)}
    with pytest.raises(ArtifactError, match="format_version must be a 64-bit integer"):
        Manifest.from_json(json.dumps(plain))


def test_writing_refuses_what_reading_would():
    with pytest.raises(ArtifactError, match=r"row_tile must be a 64-bit integer, is np\.int64"):
        replace(SMALL, row_tile=np.int64(12)).to_json()
    with pytest.raises(ArtifactError, match="primary"):
        replace(SMALL, primary="logits").to_json()
    for wrong in (replace(CLASSIFIER, labels=("cat",)), replace(SMALL, labels=("cat", "dog"))):
        with pytest.raises(ArtifactError, match="field labels must be one per column of logits"):
            wrong.to_json()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = list(_fields(json.loads(FULL.to_json())))


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_value_anywhere_is_accepted_or_an_artifact_error(path, value):
    plain = copy.deepcopy(json.loads(FULL.to_json()))
    inner = plain
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    try:
        manifest = Manifest.from_json(json.dumps(plain))
    except ArtifactError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([BufferSpec("a", ("token_tiles", "rows"), "float32", 0, 1)], "buffers: a, shape"),
        ([BufferSpec("a", ("-4",), "float32", 0, 1)], "buffers: a, shape"),
        ([BufferSpec("a", ("0",), "float32", 0, 1)], "buffers: a, shape"),
        ([BufferSpec("a", ("4**2",), "float32", 0, 1)], "buffers: a, shape"),
        ([BufferSpec("a", ("9" * 30,), "float32", 0, 1)], "buffers: a, shape"),
        ([BufferSpec("a", ("batch",), "float32", 0, 1)], "buffers: a, shape"),
        ([BufferSpec("a", ("4",), "float32", 1, 0)], "first <= last <= 1"),
        ([BufferSpec("a", ("4",), "float32", 0, 2)], "first <= last <= 1"),
        ([BufferSpec("a", ("4",), "float32", 0, 1, "b")], "buffers: a, replaces"),
        (
            [BufferSpec("a", ("4",), "float32", 1, 1), BufferSpec("b", ("4",), "float32", 1, 1, "a")],
            "buffers: b, replaces",
        ),
        (
            [BufferSpec("a", ("4",), "float32", 0, 1), BufferSpec("b", ("8",), "float32", 1, 1, "a")],
            "buffers: b, replaces",
        ),
        (
            [BufferSpec("a", ("4",), "float32", 0, 0), BufferSpec("b", ("4",), "float32", 1, 1, "a")],
            "buffers: b, replaces",
        ),
        (
            [BufferSpec("a", ("4",), "int8", 0, 1), *(BufferSpec(n, ("4",), "int8", 1, 1, "a") for n in "bc")],
            "buffers: c, replaces",
        ),
    ],
)
def test_a_buffer_that_cannot_be_planned_is_refused(buffers, message):
    with pytest.raises(ArtifactError, match=message):
        replace(SMALL, buffers=tuple(buffers), steps=("gemm",)).to_json()


def test_an_image_and_its_tokens():
    image = ImageSpec(**IMAGE)
    assert (image.shape, image.grid, image.tokens, image.columns) == ((3, 224, 230), (14, 14), 197, 768)
    made = replace(SMALL, request_limits=RequestLimits(197, 0, image=image), pooled=PooledToken("first_of", 7))
    assert Manifest.from_json(made.to_json()) == made
