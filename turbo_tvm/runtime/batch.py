"""Packing: from a list of requests to the inputs of a packed model. Pure functions over NumPy arrays.

A batch of sequences is one matrix with a row per token, rounded up once to whole row tiles; `cu_seqlens` says where
each sequence begins; `query_tiles` lists the attention's tasks. (Method: ByteTransformer, EnergonAI.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from turbo_tvm.errors import InputError
from turbo_tvm.artifact.manifest import Bounds, PooledToken, PositionRule

# parts of these stand for arrays that many requests share; NumPy takes microseconds for each that it makes
_COUNTED = np.arange(8192, dtype=np.int32)
_ZEROS = np.zeros(8192, np.int32)
for _shared in (_COUNTED, _ZEROS):
    _shared.flags.writeable = False


class Batch(NamedTuple):
    """Validated requests, one after the other.

    token_ids, token_type_ids, positions: int32 (tokens,). boundaries: int32 (batch + 1,), where each sequence begins,
    and the end of the last. columns: where each sequence's tokens stood in the caller's padded matrix, None for
    requests that came without padding. images: float32 (channels, height, width) each, None for text; the ids are 0.
    """

    token_ids: np.ndarray
    token_type_ids: np.ndarray
    positions: np.ndarray
    boundaries: np.ndarray
    columns: tuple[np.ndarray, ...] | None = None
    images: tuple[np.ndarray, ...] | None = None

    @property
    def lengths(self) -> np.ndarray:
        """int32 (batch,): tokens per sequence."""
        return self.boundaries[1:] - self.boundaries[:-1]

    def part(self, start: int, end: int) -> Batch:
        """The sequences from `start` to before `end`."""
        first, last = self.boundaries[start], self.boundaries[end]
        ids, types, positions = (x[first:last] for x in self[:3])
        columns = self.columns and self.columns[start:end]
        images = self.images and self.images[start:end]
        return Batch(ids, types, positions, self.boundaries[start : end + 1] - first, columns, images)


def join(parts: Sequence[Batch]) -> Batch:
    """The sequences of several batches, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ids, types, positions = (np.concatenate([part[i] for part in parts]) for i in range(3))
    images = tuple(image for part in parts for image in part.images or ()) or None
    return Batch(ids, types, positions, boundaries([n for part in parts for n in part.lengths.tolist()]), None, images)


def position_ids(rule: PositionRule, token_ids: np.ndarray) -> np.ndarray:
    """The position of every token of one sequence, int32 (length,), by the model's rule."""
    return ragged_positions(rule, token_ids, np.array([0, len(token_ids)], np.int32))


def ragged_positions(rule: PositionRule, token_ids: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """The position of every token of every sequence, int32 (tokens,): counted from the sequence's first."""
    if rule.kind == "count_non_pad":
        real = token_ids != rule.pad_id
        count = np.concatenate(([0], real.cumsum(dtype=np.int32)), dtype=np.int32)
        return (count[1:] - _per_token(count[boundaries[:-1]], boundaries)) * real + np.int32(rule.offset)
    count = np.arange(rule.offset, rule.offset + len(token_ids), dtype=np.int32)
    return count if len(boundaries) == 2 else count - _per_token(boundaries[:-1], boundaries)


def _per_token(values: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """A value per sequence, repeated for its tokens."""
    return values.repeat(boundaries[1:] - boundaries[:-1])


def from_sequences(sequences: Sequence, token_type_ids: Sequence | None, bounds: Bounds, rule: PositionRule) -> Batch:
    """Check a list of token id sequences and give them positions.

    Raises InputError, naming the sequence, for an empty request, an empty or over-long sequence, ids that are not
    integers or out of range, and token types that do not match.
    """
    if isinstance(sequences, str | bytes) or not isinstance(sequences, Sequence | np.ndarray):
        raise InputError(f"a list of token id sequences is needed, not {type(sequences).__name__}")
    if len(sequences) == 0:
        raise InputError("the request is empty: at least one sequence is needed")
    ids, limits = _token_ids(sequences, bounds)
    types = _token_types(token_type_ids, limits, bounds)
    return Batch(ids, types, ragged_positions(rule, ids, limits), limits)


def from_sequence(sequence: Any, token_type_ids: Any, bounds: Bounds, rule: PositionRule) -> Batch:
    """The same for one sequence, in half the time where nothing is wrong with it."""
    array = _array(sequence) if token_type_ids is None else None
    if array is not None and array.ndim == 1 and array.dtype.kind in "iu":
        count = len(array)
        if 0 < count <= bounds.max_length and array.min() >= 0 and array.max() < bounds.vocab_size:
            ids, limits = array.astype(np.int32), np.array((0, count), np.int32)
            known = rule.kind != "count_non_pad" and rule.offset + count <= len(_COUNTED)
            positions = _COUNTED[rule.offset : rule.offset + count] if known else ragged_positions(rule, ids, limits)
            return Batch(ids, _ZEROS[:count] if count <= len(_ZEROS) else np.zeros(count, np.int32), positions, limits)
    types = None if token_type_ids is None else [token_type_ids]
    return from_sequences([sequence], types, bounds, rule)


def _array(values: Any) -> np.ndarray | None:
    try:
        return np.asarray(values)
    except (TypeError, ValueError):  # `from_sequences` says what is wrong
        return None


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
    sequences, limits = _token_ids([row[kept] for row, kept in zip(ids, columns, strict=True)], bounds)
    kinds = _token_types([row[kept] for row, kept in zip(types, columns, strict=True)], limits, bounds)
    positions = [position_ids(rule, row)[kept] for row, kept in zip(ids, columns, strict=True)]
    return Batch(sequences, kinds, np.concatenate(positions), limits, columns)


def pooled_rows(rule: PooledToken, token_ids: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """The row of the token that each sequence is pooled to, by the model's rule: int32 (batch + 1,); the last is none.

    A sequence without such a token is pooled to its first.
    """
    rows = boundaries.copy()
    values = token_ids if rule.kind == "largest" else token_ids == rule.token_id
    for i, (begin, end) in enumerate(pairwise(boundaries.tolist())):
        rows[i] += values[begin:end].argmax()
    return rows


def pack_rows(values: np.ndarray, row_tile: int) -> np.ndarray:
    """A value per token as packed rows (tiles, row_tile) int32; surplus rows are 0."""
    rows = np.zeros(tiles(len(values), row_tile) * row_tile, np.int32)
    rows[: len(values)] = values
    return rows.reshape(-1, row_tile)


def tiles(rows: int, row_tile: int) -> int:
    """How many row tiles so many rows take."""
    return -(-rows // row_tile)


def check_lengths(lengths: Sequence[int], bounds: Bounds) -> list[int]:
    """The lengths as plain numbers. InputError for what is no length, or longer than the model allows."""
    if not len(lengths) or min(lengths) < 1:
        raise InputError(f"lengths are whole numbers of at least 1, and at least one of them, not {list(lengths)}")
    if max(lengths) > bounds.max_length:
        raise InputError(f"a sequence of {max(lengths)} tokens is too long: the model allows {bounds.max_length}")
    return [int(n) for n in lengths]


def symbols(layout: str, row_tile: int, lengths: Sequence[int]) -> dict[str, int]:
    """What sizes of buffers are made of, for sequences of these lengths: `manifest.SYMBOLS` by name."""
    if layout == "packed":
        return packed_symbols(row_tile, sum(lengths), len(lengths))
    batch, length = len(lengths), max(lengths)
    return {"batch": batch, "length": length, "row_tiles": tiles(batch * length, row_tile)}


def packed_symbols(row_tile: int, tokens: int, sequences: int) -> dict[str, int]:
    """The same for a packed batch, which depends on no more than this."""
    return {"token_tiles": tiles(tokens, row_tile), "sequence_tiles": tiles(sequences, row_tile)}


def boundaries(lengths: Sequence[int]) -> np.ndarray:
    """cu_seqlens, int32 (batch + 1,): the first row of each sequence, and the end of the last."""
    return np.array(list(accumulate(lengths, initial=0)), np.int32)


def query_tiles(boundaries: np.ndarray, query_tile: int, longest_first: bool = False) -> np.ndarray:
    """The attention's tasks, int32 (n, 3): first row of a tile of queries, begin and end of its sequence.

    In the order of the rows, or those of the longest sequences first.
    """
    if len(boundaries) == 2:  # one sequence: NumPy costs 6 us below, and 60 after large kernels
        end = int(boundaries[1])
        return np.array([(first, 0, end) for first in range(0, end, query_tile)], np.int32)
    begins, ends = boundaries[:-1], boundaries[1:]
    counts = (ends - begins + np.int32(query_tile - 1)) // np.int32(query_tile)
    before = counts.cumsum(dtype=np.int32) - counts
    tasks = np.array((begins - before * np.int32(query_tile), begins, ends)).T.repeat(counts, axis=0)
    tasks[:, 0] += np.arange(0, len(tasks) * query_tile, query_tile, dtype=np.int32)
    if longest_first:
        tasks = tasks[np.argsort(tasks[:, 1] - tasks[:, 2], kind="stable")]
    return tasks


def _token_ids(sequences: Sequence, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """All token ids, int32 (tokens,), and the boundaries of the sequences; InputError names the first bad one."""
    found = _at_once(sequences, bounds.max_length, bounds.vocab_size)
    if found is None:  # one by one, to say what is wrong
        arrays = [_sequence(s, i, bounds) for i, s in enumerate(sequences)]
        found = np.concatenate(arrays), [len(a) for a in arrays]
    return found[0], boundaries(found[1])


def _at_once(parts: Sequence, longest: int, size: int) -> tuple[np.ndarray, list[int]] | None:
    """The values of all sequences, int32 (tokens,), and their lengths, if nothing is wrong with any; else None."""
    try:
        arrays = [np.asarray(part) for part in parts]
    except ValueError:
        return None
    if not all(a.ndim == 1 and a.dtype.kind in "iu" for a in arrays):
        return None
    lengths = [len(a) for a in arrays]
    if min(lengths) == 0 or max(lengths) > longest:
        return None
    values = np.concatenate(arrays, dtype=np.int64, casting="unsafe")
    if values.view(np.uint64).max() >= size:  # as unsigned, negative values are large as well
        return None
    return values.astype(np.int32), lengths


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


def _token_types(given: Sequence | None, limits: np.ndarray, bounds: Bounds) -> np.ndarray:
    if given is None:
        return np.zeros(limits[-1], np.int32)
    if not isinstance(given, Sequence | np.ndarray):
        raise InputError(f"token_type_ids must be a list with one entry per sequence, not {type(given).__name__}")
    lengths = np.diff(limits).tolist()
    if len(given) != len(lengths):
        raise InputError(f"there are {len(given)} token_type_ids for {len(lengths)} sequences")
    size = max(bounds.type_vocab_size, 1)
    found = _at_once(given, bounds.max_length, size)
    if found is not None and found[1] == lengths:
        return found[0]
    types = [_integers(t, f"token_type_ids {i}").astype(np.int64) for i, t in enumerate(given)]
    for i, (kind, length) in enumerate(zip(types, lengths, strict=True)):
        if kind.shape != (length,):
            raise InputError(f"token_type_ids {i} has shape {kind.shape}, its sequence ({length},); they must be equal")
        _check_range(kind, size, f"token_type_ids {i}: type", "type vocabulary")
    return np.concatenate(types).astype(np.int32)


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
