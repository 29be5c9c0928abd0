"""The memory of a batch for the scheduler, which asks often: rounded up to few shapes, each planned once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from turbo_tvm.artifact.manifest import Manifest

TOKENS, SEQUENCES = 64, 8  # a batch counts as the next multiple


class PeakBytes:
    """`peak_bytes(lengths)`: at least what such a batch needs, and no less for a larger one."""

    def __init__(self, exact: Callable[[Sequence[int]], int], manifest: Manifest):
        self._exact = exact
        self._longest, self._padded = manifest.bounds.max_length, manifest.layout == "padded"
        self._known: dict[tuple[int, int], int] = {}

    def __call__(self, lengths: Sequence[int]) -> int:
        """Bytes."""
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
    """So many tokens in so many sequences, none of them empty and none longer than it must be."""
    tokens = max(tokens, sequences)
    return [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
