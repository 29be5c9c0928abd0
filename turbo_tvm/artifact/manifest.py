"""The manifest: what an artifact holds, what it was compiled for, how its inputs and outputs are laid out.

Frozen records, to and from JSON. Reading is strict: an unknown, missing or ill-typed field is an
ArtifactError that names the field, so that the rest of the runtime can trust every value it finds here.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from turbo_tvm.artifact.cost_spec import CostSpec, check_cost
from turbo_tvm.artifact.strict_json import AGAIN, record_of, show, wrong_field
from turbo_tvm.errors import ArtifactError

__all__ = [
    "FORMAT_VERSION",
    "LABELLED",
    "SYMBOLS",
    "Bounds",
    "BufferSpec",
    "CostSpec",
    "DeviceKernelSpec",
    "ImageBounds",
    "KernelSpec",
    "Manifest",
    "MemberSpec",
    "OutputSpec",
    "ParameterSpec",
    "PooledToken",
    "PositionRule",
    "TargetSpec",
    "TensorSpec",
    "VariantSpec",
]

FORMAT_VERSION = 7

LABELLED = "logits"  # the output that labels are for, by the name that transformers gives it

# What a batch says about itself, by layout: tiles of token rows and of sequence rows; or sequences, the longest one in
# tokens, and tiles of the rows of all of them.
SYMBOLS = {"packed": ("token_tiles", "sequence_tiles"), "padded": ("batch", "length", "row_tiles")}

# An integer annotated with the least value it may have.
Natural = Annotated[int, 0]
Positive = Annotated[int, 1]

Dtype = Literal["float64", "float32", "float16", "int64", "int32", "uint16", "int8", "uint8", "bool"]
RowKind = Literal["token", "sequence"]
InputKind = Literal[
    "token_ids",
    "token_type_ids",
    "position_ids",
    "patches",
    "cu_seqlens",
    "query_tiles",
    "pooled_rows",
    "attention_mask",
]


@dataclass(frozen=True)
class TargetSpec:
    """The machine the code was compiled for; the CPU fields always describe the CPU side of the code.

    features: the LLVM names of the CPU features the code may use (only those `cpu_features.checkable` keeps).
    architectures: of the GPUs that the artifact holds machine code for, such as "sm_80"; none for a CPU.
    """

    name: str
    triple_arch: Literal["x86_64", "aarch64"]
    mcpu: str
    features: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What runs the kernels."""
        return "cuda" if self.architectures else "cpu"


@dataclass(frozen=True)
class TensorSpec:
    """One input of the compiled function; `kind` says what the executor puts there."""

    name: str
    dtype: Dtype
    kind: InputKind


@dataclass(frozen=True)
class OutputSpec:
    """One output: a row of `columns` values per token or per sequence; squeeze drops a column axis of one."""

    name: str
    kind: RowKind
    columns: Positive
    squeeze: bool = False
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class ImageBounds:
    """What an image is: float32 (channels, height, width), cut into patches, which are tokens, from left to right.

    prefix: tokens before the first patch that hold none, such as a class token.
    """

    channels: Positive
    height: Positive
    width: Positive
    patch_height: Positive
    patch_width: Positive
    prefix: Natural = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.channels, self.height, self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; what is left of the image at the right and below is not looked at."""
        return self.height // self.patch_height, self.width // self.patch_width

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def columns(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch_height * self.patch_width


@dataclass(frozen=True)
class Bounds:
    """What a request may hold: token ids, or an image.

    max_length in tokens; vocab_size 0: the model takes images; type_vocab_size 0: it takes no token types.
    """

    max_length: Positive
    vocab_size: Natural
    type_vocab_size: Natural = 0
    image: ImageBounds | None = None


@dataclass(frozen=True)
class PositionRule:
    """How position ids follow from token ids.

    arange: offset + index. count_non_pad (RoBERTa): offset at a pad_id, elsewhere offset + the count of other
    ids up to and including this one. none: the model takes no position ids.
    """

    kind: Literal["arange", "count_non_pad", "none"] = "none"
    offset: Natural = 0
    pad_id: Natural | None = None


@dataclass(frozen=True)
class PooledToken:
    """Which token of a sequence the input `pooled_rows` names.

    first_of: the first one of that id, of a sequence without it the first of all. largest: the first one of the largest
    id (CLIP's old way to find the end of the text). none: the model has no such input.
    """

    kind: Literal["first_of", "largest", "none"] = "none"
    token_id: Natural = 0


@dataclass(frozen=True)
class BufferSpec:
    """An intermediate or output that the executor supplies, in call order; where it lies follows from the batch.

    shape: a product per dimension, of numbers and SYMBOLS: "token_tiles", "4", "12*batch". first, last: the steps,
    inclusive, between which it must keep its place; the last of an output is the number of steps. replaces: an earlier
    buffer of the same shape, last read in the step that writes this one, whose place this one may take.
    """

    name: str
    shape: tuple[str, ...]
    dtype: Dtype
    first: Natural
    last: Natural
    replaces: str | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """One packed weight, in call order; () is the shape of a scalar."""

    name: str
    shape: tuple[Positive, ...]
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class VariantSpec:
    """How a kernel runs batches of up to `max_rows` rows, 0 for all larger ones: what a tuner chose, by decision."""

    setting: dict[str, int]
    max_rows: Natural = 0


@dataclass(frozen=True)
class KernelSpec:
    """One distinct kernel and how often a run calls it, for `inspect` and the cost model.

    recipe: what it is built from, for a tuner; variants: none where nothing was tuned. flops_per_token, flops_per_pair
    (a pair is a query and a key), bytes_per_token (of rows in and out) and bytes_weights are for one call.
    """

    name: str
    family: str
    calls: Natural
    shapes: str = ""
    flops_per_token: float = 0.0
    flops_per_pair: float = 0.0
    bytes_weights: Natural = 0
    bytes_per_token: Natural = 0
    recipe: str = ""
    variants: tuple[VariantSpec, ...] = ()


@dataclass(frozen=True)
class DeviceKernelSpec:
    """What a kernel takes of a GPU of that architecture, and how often a block meets.

    registers, spill_bytes: per thread; spilled are registers that were stored to memory and loaded again. The rest is
    per block. rows: of the output, 0 if not known (of attention, queries of one head). barriers, shuffles: the latter
    as instructions of a warp; per_step: in a loop whose length the batch decides, such as that over keys.
    """

    name: str
    architecture: str
    registers: Natural
    spill_bytes: Natural
    static_shared_bytes: Natural
    dynamic_shared_bytes: Natural = 0
    threads: Positive = 1
    rows: Natural = 0
    barriers: Natural = 0
    barriers_per_step: Natural = 0
    shuffles: Natural = 0
    shuffles_per_step: Natural = 0


@dataclass(frozen=True)
class MemberSpec:
    """The check on one member of the file: sha256 in 64 lower-case hexadecimal digits, size in bytes."""

    sha256: str
    bytes: Natural


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an artifact but its code, weights and tokenizer.

    name: the model's. primary: the name of the main output, None for all of them. labels: what the columns of a
    classifier's output `logits` are called, none where the model does not say. row_tile: rows (tokens) per matrix
    tile; query_tile: query rows per attention task. relative_positions: attention looks at distances between tokens;
    pools_first: an output is made from a sequence's first token. buffers, parameters: in call order. steps: the kernels
    that a run calls, in order. device_kernels: what they take of each GPU; device_source: the sha256 of the source that
    their machine code was made from. declined: what was not fused, and why. tuning: logs that
    did not hold, and why. source_parameters: the parameter count of
    the model before packing. costs: what batches cost, by machine (`CompiledModel.machine`). members: every member
    of the file but the manifest itself; filled when the artifact is saved.
    """

    format_version: int = FORMAT_VERSION
    turbo_version: str
    tvm_version: str
    name: str
    model_type: str
    target: TargetSpec
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    layout: Literal["packed", "padded"] = "packed"
    row_tile: Positive = 1
    query_tile: Positive = 1
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    primary: str | None = None
    labels: tuple[str, ...] = ()
    bounds: Bounds
    positions: PositionRule = PositionRule()
    relative_positions: bool = False
    pools_first: bool = False
    pooled: PooledToken = PooledToken()
    buffers: tuple[BufferSpec, ...] = ()
    steps: tuple[str, ...] = ()
    parameters: tuple[ParameterSpec, ...] = ()
    kernels: tuple[KernelSpec, ...] = ()
    device_kernels: tuple[DeviceKernelSpec, ...] = ()
    device_source: str = ""
    declined: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    source_parameters: Natural = 0
    costs: dict[str, CostSpec] = field(default_factory=dict)
    members: dict[str, MemberSpec] = field(default_factory=dict)

    def to_json(self) -> str:
        """This manifest as JSON text. ArtifactError where a field holds what `from_json` would refuse."""
        plain = dataclasses.asdict(self)
        _from_plain(plain)
        return json.dumps(plain, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """The manifest in a JSON text; ArtifactError names the first field that is wrong."""
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the manifest is not valid JSON ({error}): {AGAIN}") from None
        return _from_plain(plain)


def _from_plain(plain: Any) -> Manifest:
    # The version comes first: the fields of another version are not ours to judge.
    if isinstance(plain, Mapping) and plain.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise _other_version(plain)
    manifest = record_of(Manifest, plain, "")
    for group in ("inputs", "outputs", "buffers", "parameters"):
        _refuse_duplicates(group, [item.name for item in getattr(manifest, group)])
    free: dict[str, BufferSpec] = {}  # buffers that nobody replaces yet
    for buffer in manifest.buffers:
        _check_buffer(buffer, len(manifest.steps), SYMBOLS[manifest.layout], free)
        free[buffer.name] = buffer
    for machine, cost in manifest.costs.items():
        check_cost(cost, f"costs.{show(machine)}")
    _check_bounds(manifest.bounds)
    names = [output.name for output in manifest.outputs]
    if manifest.primary is not None and manifest.primary not in names:
        raise wrong_field("primary", f"one of the outputs {names}", manifest.primary)
    columns = {output.name: output.columns for output in manifest.outputs}.get(LABELLED)
    if manifest.labels and len(manifest.labels) != columns:
        raise wrong_field("labels", f"one per column of {LABELLED}, {columns}", len(manifest.labels))
    return manifest


def _check_bounds(bounds: Bounds) -> None:
    if bounds.image is None and not bounds.vocab_size:
        raise wrong_field("bounds.vocab_size", "at least 1", 0)
    if bounds.image is not None and not all(bounds.image.grid):
        raise wrong_field("bounds.image", "an image of at least one patch", bounds.image)
    if bounds.image is not None and bounds.image.tokens != bounds.max_length:
        raise wrong_field("bounds.max_length", f"{bounds.image.tokens}, an image's tokens", bounds.max_length)


def _check_buffer(buffer: BufferSpec, steps: int, symbols: tuple[str, ...], free: dict[str, BufferSpec]) -> None:
    where = f"buffers: {buffer.name}"
    for dimension in buffer.shape:
        for factor in dimension.split("*"):
            number = int(factor) if factor.isdecimal() and factor.isascii() and len(factor) < 19 else 0
            if factor not in symbols and number < 1:
                raise wrong_field(f"{where}, shape", f"a product of numbers and {', '.join(symbols)}", dimension)
    if not buffer.first <= buffer.last <= steps:
        raise wrong_field(where, f"first <= last <= {steps}, the number of steps", (buffer.first, buffer.last))
    if buffer.replaces is not None:
        old = free.pop(buffer.replaces, None)
        alike = old is not None and (old.shape, old.dtype, old.last) == (buffer.shape, buffer.dtype, buffer.first)
        if old is None or not alike or old.first >= buffer.first:
            raise wrong_field(f"{where}, replaces", "an earlier buffer alike that is last read then", buffer.replaces)


def _other_version(plain: Mapping) -> ArtifactError:
    found, writer = plain["format_version"], plain.get("turbo_version")
    age = "a newer" if isinstance(found, int) and found > FORMAT_VERSION else "another"
    return ArtifactError(
        f"the artifact has format version {show(found)} (written by turbo_tvm {show(writer)}), but this "
        f"turbo_tvm reads version {FORMAT_VERSION}: use {age} turbo_tvm, or {AGAIN} with this one"
    )


def _refuse_duplicates(group: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ArtifactError(f"manifest field {group} has the name {show(name)} {count} times: {AGAIN}")
