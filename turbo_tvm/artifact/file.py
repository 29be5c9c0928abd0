"""The artifact: one file with a compiled model, its weights and tokenizer, and a manifest that vouches for them.

It is a zip whose members are stored uncompressed, so that weights are used where they lie in the mapped file:

    library.so            the code
    sm_80.cubin           machine code for a GPU of that architecture; only where a model is for GPUs, one each
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
import mmap
import os
import secrets
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from turbo_tvm.artifact import safetensors_layout
from turbo_tvm.artifact.manifest import Manifest
from turbo_tvm.artifact.safetensors_layout import WEIGHTS
from turbo_tvm.artifact.sealed_zip import (
    DAMAGED,
    MANIFEST,
    Span,
    check_seal,
    empty_seal,
    open_sealed,
    write_member,
    write_seal,
)
from turbo_tvm.errors import ArtifactError

__all__ = ["Artifact", "read", "write"]

LIBRARY, TOKENIZER, CUBIN = "library.so", "tokenizer.json", ".cubin"

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
    """A verified artifact."""

    manifest: Manifest
    library: bytes  # the code: a shared library
    # in call order, views into a private mapping of the file; what is written to one stays in this process
    weights: dict[str, np.ndarray]
    tokenizer: str | None  # the text of a `tokenizer.json`
    path: Path
    cubins: Mapping[str, bytes] = field(default_factory=dict)  # machine code by GPU architecture


def write(
    path: str | os.PathLike[str],
    manifest: Manifest,
    library: bytes,
    weights: Mapping[str, np.ndarray],
    tokenizer: str | None = None,
    cubins: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Save an artifact; return its manifest with `members` filled. Equal input gives equal bytes.

    The file appears at `path` whole or not at all: whatever fails, what was there stays and nothing is left
    beside it. Copies one tensor at a time at most. Raises ArtifactError, which says what failed and what to do.
    """
    _check_weights(manifest, weights)
    codes = {LIBRARY: library, **{name + CUBIN: code for name, code in sorted((cubins or {}).items())}}
    text = None if tokenizer is None else _utf8(tokenizer)
    target = _resolved(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ArtifactError(f"cannot save the artifact to {str(path)!r}: it is a device: choose the path of a file")
    temporary = target.parent / f".turbo-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            manifest = _write_members(file, manifest, codes, weights, text)
        with open(temporary, "r+b") as file:
            write_seal(file)
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
    """Map an artifact and verify all of it, without running anything that it holds.

    While the result is used, the file may be replaced or removed, but not overwritten or cut short in place: the
    mapping would follow. Raises ArtifactError, which says what is wrong with the file and what to do.
    """
    try:
        data, spans = open_sealed(path)
        check_seal(data, spans)
        manifest = Manifest.from_json(data[slice(*spans[MANIFEST])])
        _check_members(data, spans, manifest)
        weights = safetensors_layout.views(data, spans[WEIGHTS], manifest.parameters)
        tokenizer = data[slice(*spans[TOKENIZER])].decode() if TOKENIZER in spans else None
        cubins = {name: data[slice(*spans[name + CUBIN])] for name in manifest.target.architectures}
        return Artifact(manifest, data[slice(*spans[LIBRARY])], weights, tokenizer, Path(path), cubins)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"cannot use {str(path)!r}: {TOKENIZER} is not UTF-8 ({error}); {DAMAGED}") from error
    except ArtifactError as error:
        raise ArtifactError(f"cannot use {str(path)!r}: {error}") from error


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
    codes: Mapping[str, bytes],
    weights: Mapping[str, np.ndarray],
    tokenizer: bytes | None,
) -> Manifest:
    """Write the zip, with a seal of zeros; return the manifest in it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = empty_seal()
        members = {name: write_member(archive, name, len(code), [code]) for name, code in codes.items()}
        pieces = safetensors_layout.pieces(manifest.parameters, weights)
        size = safetensors_layout.file_bytes(manifest.parameters)
        members[WEIGHTS] = write_member(archive, WEIGHTS, size, pieces)
        if tokenizer is not None:
            members[TOKENIZER] = write_member(archive, TOKENIZER, len(tokenizer), [tokenizer])
        manifest = replace(manifest, members=members)
        text = manifest.to_json().encode()
        write_member(archive, MANIFEST, len(text), [text])
    return manifest


def _check_members(data: mmap.mmap, spans: dict[str, Span], manifest: Manifest) -> None:
    """Raise ArtifactError unless the file has exactly an artifact's members, with the manifest's sizes and sums."""
    cubins = {name + CUBIN for name in manifest.target.architectures}
    for name in sorted({LIBRARY, WEIGHTS, *cubins} - spans.keys() | manifest.members.keys() - spans.keys()):
        raise ArtifactError(f"its member {name!r} is missing; {DAMAGED}")
    for name in sorted(spans.keys() - {MANIFEST}):
        if name not in (LIBRARY, WEIGHTS, TOKENIZER, *cubins) or name not in manifest.members:
            raise ArtifactError(f"it has an unexpected member {name!r}; {DAMAGED}")
        (start, stop), member = spans[name], manifest.members[name]
        with memoryview(data) as view, view[start:stop] as part:
            found = hashlib.sha256(part).hexdigest()
        if (stop - start, found) != (member.bytes, member.sha256):
            raise ArtifactError(f"its member {name!r} has not the size and sha256 in the manifest; {DAMAGED}")
