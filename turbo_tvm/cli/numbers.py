"""Numbers in a form for people, and the work of a batch of given lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbo_tvm.runtime.memory.report import memory_report

if TYPE_CHECKING:
    from turbo_tvm.artifact.manifest import KernelSpec, Manifest


@dataclass(frozen=True)
class BatchCost:
    """The work of the manifest's kernels for one batch."""

    sequences: int
    tokens: int
    flops: float
    flops_padded: float  # if every sequence were as long as the longest
    bytes_weights: int  # read
    bytes_buffers: int  # peak of intermediates and outputs


def size(count: float) -> str:
    """Return bytes as text: 12345678 --> '12.3 MB'."""
    return _scaled(count, "B")


def flops(count: float) -> str:
    """Return FLOPs as text: 12345678 --> '12.3 MFLOP'."""
    return _scaled(count, "FLOP")


def tuned_words(manifest: Manifest) -> str:
    """Return ', N tuned' for the number of kernels with tuned settings; "" for none."""
    tuned = sum(bool(kernel.variants) for kernel in manifest.kernels)
    return f", {tuned} tuned" if tuned else ""


def why_padded(manifest: Manifest) -> str:
    """Return ' (reason)' for a layout that is not packed; "" for a packed one."""
    return f" ({'; '.join(manifest.declined)})" if manifest.layout != "packed" and manifest.declined else ""


def flops_per_token(kernels: Sequence[KernelSpec]) -> float:
    """Return the FLOPs per token of one run, without attention's share, which grows with the length."""
    return sum(k.calls * k.flops_per_token for k in kernels)


def flops_per_pair(kernels: Sequence[KernelSpec]) -> float:
    """Return the FLOPs of one run per pair of a query and a key."""
    return sum(k.calls * k.flops_per_pair for k in kernels)


def batch_cost(manifest: Manifest, lengths: Sequence[int]) -> BatchCost:
    """Return the work of a batch of sequences of these lengths, in the artifact's own layout."""
    widest = [max(lengths)] * len(lengths)
    padded = _flops(manifest, widest)
    return BatchCost(
        sequences=len(lengths),
        tokens=sum(lengths),
        flops=_flops(manifest, lengths) if manifest.layout == "packed" else padded,
        flops_padded=padded,
        bytes_weights=sum(k.calls * k.bytes_weights for k in manifest.kernels),
        bytes_buffers=memory_report(manifest, lengths).peak,
    )


def _flops(manifest: Manifest, lengths: Sequence[int]) -> float:
    pairs = sum(n * n for n in lengths)
    return flops_per_token(manifest.kernels) * sum(lengths) + flops_per_pair(manifest.kernels) * pairs


def _scaled(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"
