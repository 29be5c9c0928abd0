"""Packing: from a list of requests to the inputs of a packed model. Pure functions over NumPy arrays.

A batch of sequences is one matrix with a row per token, rounded up once to whole row tiles; `cu_seqlens` says where
each sequence begins; `query_tiles` lists the attention's tasks. (Method: ByteTransformer, EnergonAI.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.manifest import Bounds, PositionRule


@dataclass(frozen=True)
class Batch:
    """Validated requests, still as separate sequences.

    token_ids, token_type_ids, positions: one int32 array of shape (length,) per sequence. columns: where the
    sequence's tokens stood in the caller's padded matrix, None for requests that came without padding.
    """

    token_ids: tuple[np.ndarray, ...]
    token_type_ids: tuple[np.ndarray, ...]
    positions: tuple[np.ndarray, ...]
    columns: tuple[np.ndarray, ...] | None = None

    @property
    def lengths(self) -> np.ndarray:
        """int64 (batch,): tokens per sequence."""
        return np.array([len(ids) for ids in self.token_ids], np.int64)


def position_ids(rule: PositionRule, token_ids: np.ndarray) -> np.ndarray:
    """The position of every token of one sequence, int32 (length,), by the model's rule."""
    if rule.kind == "count_non_pad":
        real = token_ids != rule.pad_id
        return (np.cumsum(real) * real + rule.offset).astype(np.int32)
    return np.arange(rule.offset, rule.offset + len(token_ids), dtype=np.int32)


def from_sequences(sequences: Sequence, token_type_ids: Sequence | None, bounds: Bounds, rule: PositionRule) -> Batch:
    """Check a list of token id sequences and give them positions.

    Raises InputError, naming the sequence, for an empty request, an empty or over-long sequence, ids that are not
    integers or out of range, and token types that do not match.
    """
    if isinstance(sequences, str | bytes) or not isinstance(sequences, Sequence | np.ndarray):
        raise InputError(f"a list of token id sequences is needed, not {type(sequences).__name__}")
    if len(sequences) == 0:
        raise InputError("the request is empty: at least one sequence is needed")
    ids = tuple(_sequence(s, i, bounds) for i, s in enumerate(sequences))
    types = _token_types(token_type_ids, ids, bounds)
    return Batch(ids, types, tuple(position_ids(rule, s) for s in ids))


def from_padded(
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    token_type_ids: np.ndarray | None,
    bounds: Bounds,
    rule: PositionRule,
    *,
    contiguous: bool,
    first_token: bool,
) -> Batch:
    """Take the real tokens out of a padded matrix `(batch, length)`; padding may be anywhere the model allows.

    Positions are those of the padded matrix, as PyTorch computes them, so left padding gives PyTorch's answer.
    contiguous: the model looks at distances between tokens, so a mask with holes is refused. first_token: the model
    pools the first token, or counts from it, so it must be real. Raises InputError.
    """
    ids, mask = _matrix(input_ids, "input_ids"), _mask(attention_mask, input_ids)
    types = _matrix(token_type_ids, "token_type_ids") if token_type_ids is not None else np.zeros_like(ids)
    if types.shape != ids.shape:
        raise InputError(f"token_type_ids has shape {types.shape}, input_ids {ids.shape}; they must be equal")
    if ids.shape[1] > bounds.max_length:
        raise InputError(f"the matrix is {ids.shape[1]} tokens wide; the model allows {bounds.max_length}")
    columns = tuple(np.flatnonzero(row) for row in mask)
    for i, kept in enumerate(columns):
        _check_mask_row(i, kept, contiguous, first_token)
    sequences = tuple(_sequence(row[kept], i, bounds) for i, (row, kept) in enumerate(zip(ids, columns, strict=True)))
    kinds = _token_types([row[kept] for row, kept in zip(types, columns, strict=True)], sequences, bounds)
    positions = tuple(position_ids(rule, row)[kept] for row, kept in zip(ids, columns, strict=True))
    return Batch(sequences, kinds, positions, columns)


def row_tiles(lengths: np.ndarray, row_tile: int) -> int:
    """How many row tiles a packed batch of these lengths takes."""
    return -(-int(lengths.sum()) // row_tile)


def pack_rows(parts: Sequence[np.ndarray], row_tile: int) -> np.ndarray:
    """Sequences of int32 as packed rows (tiles, row_tile) int32; surplus rows are 0."""
    total = sum(len(part) for part in parts)
    rows = np.zeros(-(-total // row_tile) * row_tile, np.int32)
    np.concatenate(parts, out=rows[:total])
    return rows.reshape(-1, row_tile)


def boundaries(lengths: np.ndarray) -> np.ndarray:
    """cu_seqlens, int32 (batch + 1,): the first row of each sequence, and the end of the last."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def query_tiles(lengths: np.ndarray, query_tile: int) -> np.ndarray:
    """The attention's tasks, int32 (n, 3): first row of a tile of queries, begin and end of its sequence."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    counts = -(-lengths // query_tile)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    tile = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([begins[sequence] + tile * query_tile, begins[sequence], ends[sequence]], axis=1).astype(np.int32)


def _sequence(values: object, index: int, bounds: Bounds) -> np.ndarray:
    array = _integers(values, f"sequence {index}")
    if array.ndim != 1:
        raise InputError(f"sequence {index} has shape {array.shape}; token ids must be one flat list")
    if len(array) == 0:
        raise InputError(f"sequence {index} is empty: at least one token is needed")
    if len(array) > bounds.max_length:
        raise InputError(
            f"sequence {index} has {len(array)} tokens; the model allows {bounds.max_length}: truncate it first"
        )
    _check_range(array, bounds.vocab_size, f"sequence {index}: token id", "vocabulary")
    return array.astype(np.int32)


def _token_types(given: Sequence | None, ids: tuple[np.ndarray, ...], bounds: Bounds) -> tuple[np.ndarray, ...]:
    if given is None:
        return tuple(np.zeros_like(s) for s in ids)
    if not isinstance(given, Sequence | np.ndarray):
        raise InputError(f"token_type_ids must be a list with one entry per sequence, not {type(given).__name__}")
    if len(given) != len(ids):
        raise InputError(f"there are {len(given)} token_type_ids for {len(ids)} sequences")
    types = tuple(_integers(t, f"token_type_ids {i}").astype(np.int64) for i, t in enumerate(given))
    for i, (kind, s) in enumerate(zip(types, ids, strict=True)):
        if kind.shape != s.shape:
            raise InputError(f"token_type_ids {i} has shape {kind.shape}, its sequence {s.shape}; they must be equal")
        _check_range(kind, max(bounds.type_vocab_size, 1), f"token_type_ids {i}: type", "type vocabulary")
    return tuple(t.astype(np.int32) for t in types)


def _integers(values: object, what: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{what} is not a list of integers: {error}") from error
    if array.size and (array.dtype == bool or not np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"{what} holds {array.dtype} values; token ids are integers")
    return array


def _check_range(array: np.ndarray, size: int, what: str, where: str) -> None:
    bad = array[(array < 0) | (array >= size)]
    if bad.size:
        raise InputError(f"{what} {bad[0]} is out of range: the model's {where} has {size} entries (0 to {size - 1})")


def _matrix(values: object, what: str) -> np.ndarray:
    array = _integers(values, what)
    if array.ndim != 2:
        raise InputError(f"{what} has shape {array.shape}; a (batch, length) matrix is needed")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise InputError(f"{what} is empty: shape {array.shape}")
    return array


def _mask(given: Any, input_ids: Any) -> np.ndarray:
    shape = np.shape(input_ids)
    if given is None:
        return np.ones(shape, bool)
    mask = np.asarray(given)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}, input_ids {shape}; they must be equal")
    if not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask holds values other than 0 and 1; additive or per-pair masks are not supported")
    return mask.astype(bool)


def _check_mask_row(index: int, kept: np.ndarray, contiguous: bool, first_token: bool) -> None:
    if len(kept) == 0:
        raise InputError(f"sequence {index} is empty: its attention_mask is all zeros")
    if contiguous and kept[-1] - kept[0] + 1 != len(kept):
        raise InputError(
            f"the attention_mask of sequence {index} has holes, and to this model the distances between tokens matter; "
            "remove the masked tokens from the sequence instead"
        )
    if first_token and kept[0] != 0:
        raise InputError(
            f"the attention_mask of sequence {index} hides its first token, which this model needs; pad on the right"
        )
