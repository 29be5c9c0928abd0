"""The artifact: one file: a compiled model, its weights and tokenizer, and a manifest that vouches for them.

A zip whose members are stored as they are, so that weights are used where they lie in the mapped file:

    library.so            the code
    weights.safetensors   every tensor starts at a multiple of 64 bytes from the start of the file
    tokenizer.json        only where the model has one
    manifest.json         `Manifest`; it has the size and the sha256 of each member above
    (directory of the zip, and in its comment the seal)

The seal is the sha256 of what the manifest's sums leave out: the manifest, the zip's headers, its padding. So
every byte of the file is covered, and a change of any one is noticed before anything is used. That finds
damage; it is no signature: whoever can write a file can seal it. Every format version keeps the zip, the seal
and the manifest's `format_version`, so that each can name the others.
"""

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import secrets
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from turbo_tvm.errors import ArtifactError
from turbo_tvm.runtime.manifest import Manifest, MemberSpec, ParameterSpec

__all__ = ["Artifact", "read", "write"]

LIBRARY, WEIGHTS, TOKENIZER, MANIFEST = "library.so", "weights.safetensors", "tokenizer.json", "manifest.json"
ALIGNMENT = 64  # bytes; what TVM asks of a tensor's address
PIECE = 1 << 20  # bytes hashed and written at a time: they stay in cache in between

SEAL_LABEL = b"turbo-tvm sha256 "
SEAL_BYTES = len(SEAL_LABEL) + 64
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, bytes of the name, bytes of the extra field
END_HEADER_BYTES = 22
ZIP64_FROM = 1 << 30  # bytes; from here on a member gets 64-bit sizes in its header
ZIP64_EXTRA_BYTES = 20
# The extra field's record with which Android's zipalign pads: id, bytes that follow, alignment.
PADDING, PADDING_ID = struct.Struct("<HHH"), 0xD935

SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}
SAFETENSORS_DTYPES |= {"int8": "I8", "uint8": "U8", "bool": "BOOL"}

Span = tuple[int, int]  # the first byte of a member's data and the one after its last, from the start of the file

_DAMAGED = "it is damaged, or turbo_tvm did not write it: copy it again or compile the model again"
_ELSEWHERE = "choose a directory that you can write to"
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or save elsewhere",
    errno.EDQUOT: "your disk quota is used up: free some space or save elsewhere",
    errno.EFBIG: "files may not be this large here: save elsewhere or raise the limit (ulimit -f)",
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.ENOENT: "create the directory first",
    errno.ENOTDIR: "choose a path inside a directory",
    errno.EISDIR: "choose the path of a file, not of a directory",
}


@dataclass(frozen=True)
class Artifact:
    """A verified artifact.

    weights: in call order, views into a private mapping of the file; what is written to one stays in this
    process.
    """

    manifest: Manifest
    library: bytes
    weights: dict[str, np.ndarray]
    tokenizer: str | None
    path: Path


def write(
    path: str | os.PathLike[str],
    manifest: Manifest,
    library: bytes,
    weights: Mapping[str, np.ndarray],
    tokenizer: str | None = None,
) -> Manifest:
    """Save an artifact; return its manifest with `members` filled. Equal input gives equal bytes.

    The file appears at `path` whole or not at all: whatever fails, what was there stays and nothing is left
    beside it. ArtifactError says what failed and what to do. Copies one tensor at a time at most.
    """
    _check_weights(manifest, weights)
    text = None if tokenizer is None else _utf8(tokenizer)
    target = _resolved(path)
    temporary = target.parent / f".turbo-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            manifest = _write_members(file, manifest, library, weights, text)
        with open(temporary, "r+b") as file:
            _write_seal(file)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "save elsewhere")
        raise ArtifactError(f"cannot save the artifact to {str(path)!r} ({error.strerror}): {advice}") from error
    finally:
        # Renamed, or never made, or its directory is gone: then there is nothing to remove.
        with contextlib.suppress(OSError):
            temporary.unlink()
    return manifest


def read(path: str | os.PathLike[str]) -> Artifact:
    """Map an artifact and verify all of it; ArtifactError says what is wrong with it and what to do.

    Runs nothing that the file holds. While the result is used, the file may be replaced or removed, but not
    overwritten or cut short in place: the mapping would follow.
    """
    try:
        data, spans = _mapped(path)
        _check_seal(data, spans)
        manifest = Manifest.from_json(data[slice(*spans[MANIFEST])])
        _check_members(data, spans, manifest)
        weights = _views(data, spans[WEIGHTS], manifest.parameters)
        tokenizer = data[slice(*spans[TOKENIZER])].decode() if TOKENIZER in spans else None
        return Artifact(manifest, data[slice(*spans[LIBRARY])], weights, tokenizer, Path(path))
    except UnicodeDecodeError as error:
        raise ArtifactError(f"cannot use {str(path)!r}: {TOKENIZER} is not UTF-8 ({error}); {_DAMAGED}") from error
    except ArtifactError as error:
        raise ArtifactError(f"cannot use {str(path)!r}: {error}") from error


# Writing


def _check_weights(manifest: Manifest, weights: Mapping[str, np.ndarray]) -> None:
    specs = {spec.name: spec for spec in manifest.parameters}
    if specs.keys() != weights.keys():
        odd = ", ".join(sorted(specs.keys() ^ weights.keys()))
        raise ArtifactError(f"parameters in the manifest or the weights, but not in both: {odd}")
    for name, spec in specs.items():
        found = weights[name]
        if found.shape != spec.shape or found.dtype != np.dtype(spec.dtype):
            wanted = f"{spec.dtype}{list(spec.shape)}"
            raise ArtifactError(f"weight {name!r} is {found.dtype}{list(found.shape)}, the manifest has {wanted}")


def _utf8(tokenizer: str) -> bytes:
    try:
        return tokenizer.encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(f"cannot save the tokenizer: its text is not valid Unicode ({error})") from error


def _resolved(path: str | os.PathLike[str]) -> Path:
    # Through symbolic links: a save replaces the file that a link names, not the link.
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise ArtifactError(f"cannot save the artifact to {str(path)!r} ({error}): choose another name") from error


def _write_members(
    file: IO[bytes],
    manifest: Manifest,
    library: bytes,
    weights: Mapping[str, np.ndarray],
    tokenizer: bytes | None,
) -> Manifest:
    """Write the zip, with a seal of zeros; return the manifest in it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = SEAL_LABEL + b"0" * 64
        members = {LIBRARY: _write_member(archive, LIBRARY, len(library), [library])}
        header = _safetensors_header(manifest.parameters)
        size = len(header) + sum(map(_padded_bytes, manifest.parameters))
        pieces = _weight_pieces(header, manifest.parameters, weights)
        members[WEIGHTS] = _write_member(archive, WEIGHTS, size, pieces)
        if tokenizer is not None:
            members[TOKENIZER] = _write_member(archive, TOKENIZER, len(tokenizer), [tokenizer])
        manifest = replace(manifest, members=members)
        text = manifest.to_json().encode()
        _write_member(archive, MANIFEST, len(text), [text])
    return manifest


def _write_member(archive: zipfile.ZipFile, name: str, size: int, pieces: Iterable[Any]) -> MemberSpec:
    """Append a member, its data aligned. pieces: contiguous buffers of bytes, `size` bytes in all."""
    info = zipfile.ZipInfo(name)  # dated 1980-01-01, always
    info.create_system, info.external_attr = 3, 0o644 << 16
    large = size >= ZIP64_FROM
    start = archive.start_dir + LOCAL_HEADER.size + len(name) + PADDING.size + ZIP64_EXTRA_BYTES * large
    gap = -start % ALIGNMENT
    info.extra = PADDING.pack(PADDING_ID, 2 + gap, ALIGNMENT) + bytes(gap)
    digest = hashlib.sha256()
    with archive.open(info, "w", force_zip64=large) as member:
        for piece in pieces:
            for first in range(0, len(piece), PIECE):
                part = piece[first : first + PIECE]
                digest.update(part)
                member.write(part)
    return MemberSpec(digest.hexdigest(), size)


def _write_seal(file: IO[bytes]) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        seal = _seal(data, _spans(file, data))
    file.seek(-len(seal), os.SEEK_END)
    file.write(seal)
    file.flush()


def _weight_pieces(
    header: bytes, parameters: Iterable[ParameterSpec], weights: Mapping[str, np.ndarray]
) -> Iterator[Any]:
    yield header
    for spec in parameters:
        yield np.ascontiguousarray(weights[spec.name]).reshape(-1).view(np.uint8).data
        yield bytes(_padded_bytes(spec) - _exact_bytes(spec))


def _safetensors_header(parameters: Iterable[ParameterSpec]) -> bytes:
    """The start of a safetensors file, padded with spaces to a multiple of ALIGNMENT.

    The tensors follow in order. Where one ends before a multiple of ALIGNMENT, a tensor of bytes that nobody
    reads fills the gap: safetensors allows no holes.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for spec in parameters:
        if spec.name.startswith("__"):
            raise ArtifactError(f"weight {spec.name!r}: names with two leading underscores are safetensors' own")
        end, padded = offset + _exact_bytes(spec), offset + _padded_bytes(spec)
        dtype = SAFETENSORS_DTYPES[spec.dtype]
        entries[spec.name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [offset, end]}
        if padded > end:
            gap = {"dtype": "U8", "shape": [padded - end], "data_offsets": [end, padded]}
            entries[f"__padding__.{spec.name}"] = gap
        offset = padded
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _exact_bytes(spec: ParameterSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _padded_bytes(spec: ParameterSpec) -> int:
    return -(-_exact_bytes(spec) // ALIGNMENT) * ALIGNMENT


# Reading


def _mapped(path: str | os.PathLike[str]) -> tuple[mmap.mmap, dict[str, Span]]:
    """The file's private mapping, and where its members are."""
    try:
        # Asked first: to open a named pipe is to wait for its other end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ArtifactError("it is a directory or a device: give the path of an artifact's file")
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ArtifactError(f"it is empty; {_DAMAGED}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return data, _spans(file, data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"it cannot be read ({reason}): check the path and who may read it") from error


def _spans(file: IO[bytes], data: mmap.mmap) -> dict[str, Span]:
    """Where each member's data lies. ArtifactError unless the members, stored, fill the zip without a gap."""
    if data[:4] != b"PK\3\4":
        raise ArtifactError(f"it is not an artifact (not a zip file); {_DAMAGED}")
    end = len(data) - SEAL_BYTES - END_HEADER_BYTES
    if end < 0 or data[end : end + 4] != b"PK\5\6" or data[-SEAL_BYTES:-64] != SEAL_LABEL:
        raise ArtifactError(f"its end is missing: it is cut short; {_DAMAGED}")
    try:
        archive = zipfile.ZipFile(file)
    # What zipfile raises for a bad directory is not documented; a test feeds it plenty.
    except Exception as error:
        raise ArtifactError(f"its zip directory cannot be read ({error}); {_DAMAGED}") from error
    spans: dict[str, Span] = {}
    position = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.orig_filename
        if name in spans:
            raise ArtifactError(f"it has the member {name!r} twice; {_DAMAGED}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ArtifactError(f"its member {name!r} is compressed or encrypted; {_DAMAGED}")
        spans[name] = _span(data, info, position)
        position = spans[name][1]
    if position != archive.start_dir:
        raise ArtifactError(f"it has bytes that belong to no member, or members that overlap; {_DAMAGED}")
    if MANIFEST not in spans:
        raise ArtifactError(f"it has no {MANIFEST}; {_DAMAGED}")
    return spans


def _span(data: mmap.mmap, info: zipfile.ZipInfo, position: int) -> Span:
    """Where the data of the member lies whose local header is at `position`."""
    header = data[position : position + LOCAL_HEADER.size]
    if info.header_offset == position and len(header) == LOCAL_HEADER.size:
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        first = position + LOCAL_HEADER.size
        name = data[first : first + name_bytes]
        start = first + name_bytes + extra_bytes
        stop = start + info.file_size
        if signature == b"PK\3\4" and name == info.orig_filename.encode(errors="replace") and stop <= len(data):
            return start, stop
    raise ArtifactError(f"its member {info.orig_filename!r} is not where the zip's directory says; {_DAMAGED}")


def _seal(data: mmap.mmap, spans: dict[str, Span]) -> bytes:
    """The sha256, in hexadecimal, of every byte but the seal's own and those of the members with a sum."""
    digest = hashlib.sha256()
    position = 0
    for start, stop in sorted(span for name, span in spans.items() if name != MANIFEST):
        digest.update(data[position:start])
        position = stop
    digest.update(data[position:-64])
    return digest.hexdigest().encode()


def _check_seal(data: mmap.mmap, spans: dict[str, Span]) -> None:
    if data[-64:] != _seal(data, spans):
        raise ArtifactError(f"its manifest or its zip headers do not match its seal; {_DAMAGED}")


def _check_members(data: mmap.mmap, spans: dict[str, Span], manifest: Manifest) -> None:
    """Exactly the members that an artifact has, each with the size and the sum in the manifest."""
    for name in sorted({LIBRARY, WEIGHTS} - spans.keys() | manifest.members.keys() - spans.keys()):
        raise ArtifactError(f"its member {name!r} is missing; {_DAMAGED}")
    for name in sorted(spans.keys() - {MANIFEST}):
        if name not in (LIBRARY, WEIGHTS, TOKENIZER) or name not in manifest.members:
            raise ArtifactError(f"it has an unexpected member {name!r}; {_DAMAGED}")
        (start, stop), member = spans[name], manifest.members[name]
        with memoryview(data) as view, view[start:stop] as part:
            found = hashlib.sha256(part).hexdigest()
        if (stop - start, found) != (member.bytes, member.sha256):
            raise ArtifactError(f"its member {name!r} has not the size and sha256 in the manifest; {_DAMAGED}")


def _views(data: mmap.mmap, span: Span, parameters: tuple[ParameterSpec, ...]) -> dict[str, np.ndarray]:
    """The weights, where they lie. Only the one header that `write` gives these parameters is accepted."""
    start, stop = span
    header = _safetensors_header(parameters)
    offset = start + len(header)
    if data[start:offset] != header:
        raise ArtifactError(f"{_difference(data, span, parameters)}; {_DAMAGED}")
    if start % ALIGNMENT or offset + sum(map(_padded_bytes, parameters)) != stop:
        raise ArtifactError(f"its member {WEIGHTS!r} is misaligned or cut short; {_DAMAGED}")
    weights = {}
    for spec in parameters:
        weights[spec.name] = np.ndarray(spec.shape, spec.dtype, data, offset)
        offset += _padded_bytes(spec)
    return weights


def _difference(data: mmap.mmap, span: Span, parameters: Iterable[ParameterSpec]) -> str:
    """How the header of the weights differs from what the manifest's parameters ask for."""
    first = span[0] + 8
    header_bytes = int.from_bytes(data[span[0] : first], "little")
    try:
        found = json.loads(data[first : min(first + header_bytes, span[1])])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return f"the header of {WEIGHTS!r} is not a JSON object"
    for spec in parameters:
        entry = found.get(spec.name)
        if not isinstance(entry, dict):
            return f"parameter {spec.name!r} of the manifest is missing from {WEIGHTS!r}"
        wanted = (SAFETENSORS_DTYPES[spec.dtype], list(spec.shape))
        if (entry.get("dtype"), entry.get("shape")) != wanted:
            return f"parameter {spec.name!r} is {wanted} in the manifest, but not in {WEIGHTS!r}"
    return f"the tensors in {WEIGHTS!r} are not those of the manifest in its order"
