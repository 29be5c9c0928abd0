"""A sealed zip: members stored uncompressed and aligned, without a gap, under a seal in the zip's comment.

The seal is the sha256 of what the sums in the member `MANIFEST` leave out: that member, the zip's headers, its padding.
Reading is strict: only what `write_member` and `write_seal` lay out is accepted, and nothing else is ever looked at.
"""

import hashlib
import mmap
import os
import stat
import struct
import zipfile
from collections.abc import Iterable
from typing import IO, Any

from turbo_tvm.artifact.manifest import MemberSpec
from turbo_tvm.errors import ArtifactError

__all__ = ["ALIGNMENT", "DAMAGED", "MANIFEST", "SEAL_BYTES", "SEAL_LABEL", "Span"]
__all__ += ["check_seal", "empty_seal", "open_sealed", "write_member", "write_seal"]

MANIFEST = "manifest.json"  # the member that the seal covers; its sums cover every other
ALIGNMENT = 64  # bytes; TVM requires it of a tensor's address
PIECE = 1 << 20  # bytes hashed and written at a time: they stay in cache in between

SEAL_LABEL = b"turbo-tvm sha256 "
SEAL_BYTES = len(SEAL_LABEL) + 64
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, bytes of the name, bytes of the extra field
END_HEADER_BYTES = 22
ZIP64_FROM = 1 << 30  # bytes; from here on a member gets 64-bit sizes in its header
ZIP64_EXTRA_BYTES = 20
# The extra field's record with which Android's zipalign pads: id, bytes that follow, alignment.
PADDING, PADDING_ID = struct.Struct("<HHH"), 0xD935

Span = tuple[int, int]  # the first byte of a member's data and the one after its last, from the start of the file

DAMAGED = "it is damaged, or turbo_tvm did not write it: copy it again or compile the model again"


def empty_seal() -> bytes:
    """Return a seal of zeros: the zip's comment until `write_seal` has filled it."""
    return SEAL_LABEL + b"0" * 64


def write_member(archive: zipfile.ZipFile, name: str, size: int, pieces: Iterable[Any]) -> MemberSpec:
    """Append a member, its data aligned, and return its sum. pieces: contiguous buffers, `size` bytes in all."""
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


def write_seal(file: IO[bytes]) -> None:
    """Fill the seal of a finished zip that is open for reading and writing."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        seal = _seal(data, _spans(file, data))
    file.seek(-len(seal), os.SEEK_END)
    file.write(seal)
    file.flush()


def open_sealed(path: str | os.PathLike[str]) -> tuple[mmap.mmap, dict[str, Span]]:
    """Return the file's private mapping, and where its members are. Raises ArtifactError for what is no artifact."""
    try:
        # Checked before opening: to open a named pipe is to wait for its other end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ArtifactError("it is a directory or a device: give the path of an artifact's file")
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ArtifactError(f"it is empty; {DAMAGED}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return data, _spans(file, data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"it cannot be read ({reason}): check the path and who may read it") from error


def check_seal(data: mmap.mmap, spans: dict[str, Span]) -> None:
    """Raise ArtifactError if a byte that the manifest's sums leave out has changed."""
    if data[-64:] != _seal(data, spans):
        raise ArtifactError(f"its manifest or its zip headers do not match its seal; {DAMAGED}")


def _seal(data: mmap.mmap, spans: dict[str, Span]) -> bytes:
    """Return the sha256, in hexadecimal, of every byte but the seal's own and those of the members with a sum."""
    digest = hashlib.sha256()
    position = 0
    for start, stop in sorted(span for name, span in spans.items() if name != MANIFEST):
        digest.update(data[position:start])
        position = stop
    digest.update(data[position:-64])
    return digest.hexdigest().encode()


def _spans(file: IO[bytes], data: mmap.mmap) -> dict[str, Span]:
    """Return where each member's data lies. Raises ArtifactError unless the members fill the zip without a gap."""
    if data[:4] != b"PK\3\4":
        raise ArtifactError(f"it is not an artifact (not a zip file); {DAMAGED}")
    end = len(data) - SEAL_BYTES - END_HEADER_BYTES
    if end < 0 or data[end : end + 4] != b"PK\5\6" or data[-SEAL_BYTES:-64] != SEAL_LABEL:
        raise ArtifactError(f"its end is missing: it is cut short; {DAMAGED}")
    try:
        archive = zipfile.ZipFile(file)
    # What zipfile raises for a bad directory is not documented; a test feeds it plenty.
    except Exception as error:
        raise ArtifactError(f"its zip directory cannot be read ({error}); {DAMAGED}") from error
    spans: dict[str, Span] = {}
    position = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.orig_filename
        if name in spans:
            raise ArtifactError(f"it has the member {name!r} twice; {DAMAGED}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ArtifactError(f"its member {name!r} is compressed or encrypted; {DAMAGED}")
        spans[name] = _span(data, info, position)
        position = spans[name][1]
    if position != archive.start_dir:
        raise ArtifactError(f"it has bytes that belong to no member, or members that overlap; {DAMAGED}")
    if MANIFEST not in spans:
        raise ArtifactError(f"it has no {MANIFEST}; {DAMAGED}")
    return spans


def _span(data: mmap.mmap, info: zipfile.ZipInfo, position: int) -> Span:
    """Return where a member's data lies. Raises ArtifactError unless its local header is at `position`."""
    header = data[position : position + LOCAL_HEADER.size]
    if info.header_offset == position and len(header) == LOCAL_HEADER.size:
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        first = position + LOCAL_HEADER.size
        name = data[first : first + name_bytes]
        start = first + name_bytes + extra_bytes
        stop = start + info.file_size
        if signature == b"PK\3\4" and name == info.orig_filename.encode(errors="replace") and stop <= len(data):
            return start, stop
    raise ArtifactError(f"its member {info.orig_filename!r} is not where the zip's directory says; {DAMAGED}")
