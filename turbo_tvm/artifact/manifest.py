"""The manifest: what an artifact holds, what it was compiled for, how its inputs and outputs are laid out.

It consists of frozen records, to and from JSON. Reading is strict: an unknown, missing or ill-typed field is an
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
    "BufferSpec",
    "CostSpec",
    "DeviceKernelSpec",
    "ImageSpec",
    "KernelSpec",
    "Manifest",
    "MemberSpec",
    "OutputSpec",
    "ParameterSpec",
    "PooledToken",
    "PositionRule",
    "ProblemType",
    "RequestLimits",
    "TargetSpec",
    "TensorSpec",
    "TextRule",
    "VariantSpec",
]

FORMAT_VERSION = 9

LABELLED = "logits"  # the output that labels are for, by the name that transformers gives it

# The symbols that sizes of buffers consist of, by layout: row tiles of tokens and of pooled rows; or the number of
# sequences, the length of the longest in tokens, and the row tiles of the rectangle.
SYMBOLS = {"packed": ("token_tiles", "sequence_tiles"), "padded": ("batch", "length", "row_tiles")}

# An integer annotated with the least value it may have.
Natural = Annotated[int, 0]
Positive = Annotated[int, 1]

Dtype = Literal["float64", "float32", "float16", "int64", "int32", "uint16", "int8", "uint8", "bool"]
RowKind = Literal["token", "sequence"]
# What the logits of a classifier are, by the names that transformers gives them.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
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
    """The machine that the code was compiled for; the CPU fields always describe the CPU side of the code."""

    name: str
    triple_arch: Literal["x86_64", "aarch64"]
    mcpu: str
    # LLVM's names of the CPU features that the code may use, of those that `cpu_features.checkable` keeps
    features: tuple[str, ...] = ()
    # GPUs that the artifact holds machine code for, such as "sm_80"; none for a CPU
    architectures: tuple[str, ...] = ()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The kind of device that runs the kernels."""
        return "cuda" if self.architectures else "cpu"


@dataclass(frozen=True)
class TensorSpec:
    """One input of the compiled function."""

    name: str
    dtype: Dtype
    kind: InputKind  # what the executor puts there


@dataclass(frozen=True)
class OutputSpec:
    """One output: a row of `columns` values per token or per sequence."""

    name: str
    kind: RowKind
    columns: Positive
    squeeze: bool = False  # whether to drop a column axis of one
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class ImageSpec:
    """The form of an image: float32 (channels, height, width), cut into patches, which are tokens, row by row."""

    channels: Positive
    height: Positive  # pixels
    width: Positive
    patch_height: Positive
    patch_width: Positive
    prefix: Natural = 0  # tokens before the first patch that hold none, such as a class token

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; the rest of the image at the right and below is not used."""
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
class RequestLimits:
    """What a request may hold: token ids, or an image."""

    max_length: Positive  # tokens
    vocab_size: Natural  # 0 if the model takes images
    type_vocab_size: Natural = 0  # 0 if the model takes no token types
    image: ImageSpec | None = None


@dataclass(frozen=True)
class PositionRule:
    """How position ids follow from token ids.

    - arange: offset + index.
    - count_non_pad (RoBERTa): offset at a pad_id; elsewhere offset + the count of other ids up to and including this.
    - none: the model takes no position ids.
    """

    kind: Literal["arange", "count_non_pad", "none"] = "none"
    offset: Natural = 0
    pad_id: Natural | None = None


@dataclass(frozen=True)
class PooledToken:
    """Which token of a sequence the input `pooled_rows` names.

    - first_of: the first one with id `token_id`; in a sequence without it the first of all.
    - largest: the first one with the largest id (CLIP's old way to find the end of the text).
    - none: the model has no such input.
    """

    kind: Literal["first_of", "largest", "none"] = "none"
    token_id: Natural = 0


@dataclass(frozen=True)
class TextRule:
    """How texts become tokens, beyond what the tokenizer says: sequences too long, token types, prompts."""

    cut: Literal["right", "left"] = "right"  # the end at which a text that is too long loses tokens
    token_types: bool = True  # whether those of the tokenizer are used; else all are 0
    prompts: dict[str, str] = field(default_factory=dict)  # texts that are put before others, by name
    default_prompt: str | None = None  # the name of the one that is put before texts of which nothing is said
    pools_prompt: bool = True  # whether a pooling takes a prompt's tokens for those of the text


@dataclass(frozen=True)
class BufferSpec:
    """An intermediate or output that the executor supplies, in call order; where it lies follows from the batch."""

    name: str
    shape: tuple[str, ...]  # per dimension a product of numbers and SYMBOLS: "token_tiles", "4", "12*batch"
    dtype: Dtype
    first: Natural  # the first step in which it must keep its place
    last: Natural  # the last such step, inclusive; of an output the number of steps
    # an earlier buffer of the same shape, last read in the step that writes this one, whose place this one may take
    replaces: str | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """One packed weight, in call order; a scalar has the shape ()."""

    name: str
    shape: tuple[Positive, ...]
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class VariantSpec:
    """How a kernel runs batches of up to `max_rows` rows, as a tuner chose it."""

    setting: dict[str, int]  # the value of each knob by its name
    max_rows: Natural = 0  # 0 for all larger batches


@dataclass(frozen=True)
class KernelSpec:
    """One distinct kernel and how often a run calls it, for `inspect` and the cost model.

    Its flops and bytes are those of one call.
    """

    name: str
    family: str
    calls: Natural
    shapes: str = ""
    flops_per_token: float = 0.0
    flops_per_pair: float = 0.0  # of a query and a key
    bytes_weights: Natural = 0
    bytes_per_token: Natural = 0  # of rows in and out
    recipe: str = ""  # what it is built from, for a tuner
    variants: tuple[VariantSpec, ...] = ()  # none where nothing was tuned


@dataclass(frozen=True)
class DeviceKernelSpec:
    """What a kernel takes of a GPU of an architecture, and how often the threads of a block synchronise.

    A step is a pass of a loop whose length the batch decides, such as that over keys.
    """

    name: str
    architecture: str
    registers: Natural  # per thread
    spill_bytes: Natural  # per thread, of registers that are stored to memory and loaded again
    static_shared_bytes: Natural  # per block, as all below
    dynamic_shared_bytes: Natural = 0
    threads: Positive = 1
    rows: Natural = 0  # of the output, or queries of one head for attention; 0 if not known
    barriers: Natural = 0
    barriers_per_step: Natural = 0
    shuffles: Natural = 0  # instructions of a warp
    shuffles_per_step: Natural = 0


@dataclass(frozen=True)
class MemberSpec:
    """What one member of the file is checked against."""

    sha256: str  # 64 lower-case hexadecimal digits
    bytes: Natural  # its size


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an artifact but its code, weights and tokenizer."""

    format_version: int = FORMAT_VERSION
    turbo_version: str
    tvm_version: str
    name: str  # of the model
    model_type: str
    entry: str  # the name of the compiled function
    captured: str | None = None  # that of its twin, which a GPU replays as one CUDA graph; None without one
    target: TargetSpec
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    layout: Literal["packed", "padded"] = "packed"
    row_tile: Positive = 1  # rows (tokens) per tile of a matrix
    query_tile: Positive = 1  # query rows per task of the attention
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    primary: str | None = None  # the name of the main output; None if all of them are
    labels: tuple[str, ...] = ()  # names of the columns of a classifier's `logits`; none where the model has none
    problem_type: ProblemType | None = None  # None where a classifier does not say it
    request_limits: RequestLimits
    positions: PositionRule = PositionRule()
    texts: TextRule = TextRule()
    relative_positions: bool = False  # whether attention looks at distances between tokens
    pools_first: bool = False  # whether an output is made from a sequence's first token
    pooled: PooledToken = PooledToken()
    buffers: tuple[BufferSpec, ...] = ()  # in call order
    steps: tuple[str, ...] = ()  # the kernels that a run calls, in order
    parameters: tuple[ParameterSpec, ...] = ()  # in call order
    kernels: tuple[KernelSpec, ...] = ()
    device_kernels: tuple[DeviceKernelSpec, ...] = ()  # of each GPU
    device_source: str = ""  # sha256 of the source that the GPUs' machine code was made from
    declined: tuple[str, ...] = ()  # what was not fused, and why
    tuning: tuple[str, ...] = ()  # tuning logs that did not hold, and why
    source_parameters: Natural = 0  # the model's parameter count before packing
    costs: dict[str, CostSpec] = field(default_factory=dict)  # by machine (`CompiledModel.machine`)
    # every member of the file but the manifest itself; filled when the artifact is saved
    members: dict[str, MemberSpec] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return this manifest as JSON text. Raises ArtifactError where a field holds what `from_json` would refuse."""
        plain = dataclasses.asdict(self)
        _from_plain(plain)
        return json.dumps(plain, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """Read a manifest from JSON text. Raises ArtifactError, which names the first field that is wrong."""
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the manifest is not valid JSON ({error}): {AGAIN}") from None
        return _from_plain(plain)


def _from_plain(plain: Any) -> Manifest:
    # The version comes first: this reader cannot judge the fields of another version.
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
    _check_request_limits(manifest.request_limits)
    if manifest.texts.default_prompt not in (None, *manifest.texts.prompts):
        raise wrong_field("texts.default_prompt", "the name of a prompt", manifest.texts.default_prompt)
    names = [output.name for output in manifest.outputs]
    if manifest.primary is not None and manifest.primary not in names:
        raise wrong_field("primary", f"one of the outputs {names}", manifest.primary)
    columns = {output.name: output.columns for output in manifest.outputs}.get(LABELLED)
    if manifest.labels and len(manifest.labels) != columns:
        raise wrong_field("labels", f"one per column of {LABELLED}, {columns}", len(manifest.labels))
    return manifest


def _check_request_limits(limits: RequestLimits) -> None:
    where, image = "request_limits", limits.image
    if image is None and not limits.vocab_size:
        raise wrong_field(f"{where}.vocab_size", "at least 1", 0)
    if image is not None and not all(image.grid):
        raise wrong_field(f"{where}.image", "an image of at least one patch", image)
    if image is not None and image.tokens != limits.max_length:
        raise wrong_field(f"{where}.max_length", f"{image.tokens}, an image's tokens", limits.max_length)


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
