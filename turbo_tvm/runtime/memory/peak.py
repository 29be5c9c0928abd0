"""The memory that a batch needs, for the scheduler, which asks often: rounded up to few shapes, each planned once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from turbo_tvm.artifact.manifest import Manifest

TOKENS, SEQUENCES = 64, 8  # a batch's tokens and sequences are rounded up to the next multiple


class PeakBytes:
    """An upper bound on the bytes that a batch needs; no less for a larger batch.

    exact: the exact bytes for lengths, which is slow.
    """

    def __init__(self, exact: Callable[[Sequence[int]], int], manifest: Manifest):
        self._exact = exact
        self._longest, self._padded = manifest.request_limits.max_length, manifest.layout == "padded"
        self._known: dict[tuple[int, int], int] = {}

    def __call__(self, lengths: Sequence[int]) -> int:
        """Return the bytes for a batch of sequences of these lengths."""
        if self._padded:
            key = _up(len(lengths), SEQUENCES), min(_up(max(lengths), TOKENS), self._longest)
            shape = [key[1]] * key[0]
        else:  # the memory of a packed batch depends on its tokens and sequences alone
            key = _up(len(lengths), SEQUENCES), _up(sum(lengths), TOKENS)
            shape = _spread(key[1], max(key[0], -(-key[1] // self._longest)))
        if key not in self._known:
            self._known[key] = self._exact(shape)
        return self._known[key]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _spread(tokens: int, sequences: int) -> list[int]:
    """Return the lengths of this many sequences of this many tokens, none empty and none longer than it must be."""
    tokens = max(tokens, sequences)
    return [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
