"""Packing: from validated requests to the inputs of a packed model. Pure functions over NumPy arrays.

A batch of sequences is one matrix with a row per token, rounded up once to whole row tiles; `cu_seqlens` says where
each sequence begins; `query_tiles` lists the attention's tasks. (Method: ByteTransformer, EnergonAI.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from turbo_tvm.artifact.manifest import PooledToken, PositionRule

# Slices of these replace arrays that many requests have in common: NumPy takes microseconds to make each.
COUNTED = np.arange(8192, dtype=np.int32)
ZEROS = np.zeros(8192, np.int32)
for _shared in (COUNTED, ZEROS):
    _shared.flags.writeable = False


class Batch(NamedTuple):
    """Validated requests, one after the other."""

    # int32 (tokens,); of images all ids are 0
    token_ids: np.ndarray
    token_type_ids: np.ndarray
    positions: np.ndarray
    # int32 (batch + 1,): the first token of each sequence, and the end of the last
    cu_seqlens: np.ndarray
    # per sequence, the columns its tokens had in the caller's padded matrix; None for requests without padding
    columns: tuple[np.ndarray, ...] | None = None
    # float32 (channels, height, width) each; None for text
    images: tuple[np.ndarray, ...] | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int32 (batch,)."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def part(self, start: int, end: int) -> Batch:
        """Return the sequences from `start` to before `end`."""
        first, last = self.cu_seqlens[start], self.cu_seqlens[end]
        ids, types, positions = (x[first:last] for x in self[:3])
        columns = self.columns and self.columns[start:end]
        images = self.images and self.images[start:end]
        return Batch(ids, types, positions, self.cu_seqlens[start : end + 1] - first, columns, images)


def join(parts: Sequence[Batch]) -> Batch:
    """Return the sequences of several batches, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ids, types, positions = (np.concatenate([part[i] for part in parts]) for i in range(3))
    images = tuple(image for part in parts for image in part.images or ()) or None
    return Batch(
        ids, types, positions, cu_seqlens_of([n for part in parts for n in part.lengths.tolist()]), None, images
    )


def position_ids(rule: PositionRule, token_ids: np.ndarray) -> np.ndarray:
    """Return the position of every token of one sequence, int32 (length,), by the model's rule."""
    return ragged_positions(rule, token_ids, np.array([0, len(token_ids)], np.int32))


def ragged_positions(rule: PositionRule, token_ids: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Return the position of every token of every sequence, int32 (tokens,), counted from the sequence's first."""
    if rule.kind == "count_non_pad":
        real = token_ids != rule.pad_id
        count = np.concatenate(([0], real.cumsum(dtype=np.int32)), dtype=np.int32)
        return (count[1:] - _per_token(count[cu_seqlens[:-1]], cu_seqlens)) * real + np.int32(rule.offset)
    count = np.arange(rule.offset, rule.offset + len(token_ids), dtype=np.int32)
    return count if len(cu_seqlens) == 2 else count - _per_token(cu_seqlens[:-1], cu_seqlens)


def _per_token(values: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Repeat the value of each sequence for each of its tokens."""
    return values.repeat(cu_seqlens[1:] - cu_seqlens[:-1])


def pooled_rows(rule: PooledToken, token_ids: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Return the row of the token that each sequence is pooled to, int32 (batch + 1,), by the model's rule.

    A sequence without such a token is pooled to its first. The last entry stands for no sequence.
    """
    rows = cu_seqlens.copy()
    values = token_ids if rule.kind == "largest" else token_ids == rule.token_id
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows[i] += values[begin:end].argmax()
    return rows


def pack_rows(values: np.ndarray, row_tile: int) -> np.ndarray:
    """Return one value per token as packed rows, int32 (row tiles, row_tile); surplus rows are 0."""
    rows = np.zeros(row_tile_count(len(values), row_tile) * row_tile, np.int32)
    rows[: len(values)] = values
    return rows.reshape(-1, row_tile)


def row_tile_count(rows: int, row_tile: int) -> int:
    """Return how many row tiles hold this many rows."""
    return -(-rows // row_tile)


def symbols(layout: str, row_tile: int, lengths: Sequence[int]) -> dict[str, int]:
    """Return the value of each symbol that the sizes of buffers consist of (`manifest.SYMBOLS`), for these lengths."""
    if layout == "packed":
        return packed_symbols(row_tile, sum(lengths), len(lengths))
    batch, length = len(lengths), max(lengths)
    return {"batch": batch, "length": length, "row_tiles": row_tile_count(batch * length, row_tile)}


def packed_symbols(row_tile: int, tokens: int, sequences: int) -> dict[str, int]:
    """Return the symbols of a packed batch, which depend on its tokens and sequences alone."""
    return {"token_tiles": row_tile_count(tokens, row_tile), "sequence_tiles": row_tile_count(sequences, row_tile)}


def cu_seqlens_of(lengths: Sequence[int]) -> np.ndarray:
    """Return cu_seqlens, int32 (batch + 1,): the first row of each sequence, and the end of the last."""
    return np.array(list(accumulate(lengths, initial=0)), np.int32)


def query_tiles(cu_seqlens: np.ndarray, query_tile: int, longest_first: bool = False) -> np.ndarray:
    """Return the attention's tasks, int32 (n, 3): first row of a query tile, begin and end of its sequence.

    They are in the order of the rows, or those of the longest sequences first.
    """
    if len(cu_seqlens) == 2:  # one sequence: NumPy costs 6 us below, and 60 after large kernels
        end = int(cu_seqlens[1])
        return np.array([(first, 0, end) for first in range(0, end, query_tile)], np.int32)
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = (ends - begins + np.int32(query_tile - 1)) // np.int32(query_tile)
    before = counts.cumsum(dtype=np.int32) - counts
    tasks = np.array((begins - before * np.int32(query_tile), begins, ends)).T.repeat(counts, axis=0)
    tasks[:, 0] += np.arange(0, len(tasks) * query_tile, query_tile, dtype=np.int32)
    if longest_first:
        tasks = tasks[np.argsort(tasks[:, 1] - tasks[:, 2], kind="stable")]
    return tasks
