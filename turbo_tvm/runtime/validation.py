"""Validation: from what a caller sends to a `Batch`, or an InputError that says what is wrong with it.

Pure functions over NumPy arrays. Lists of token ids come from `run` and the engine, padded matrices from the call that
a PyTorch model has. Images are checked in `images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from turbo_tvm.artifact.manifest import PositionRule, RequestLimits
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import COUNTED, ZEROS, Batch, cu_seqlens_of, position_ids, ragged_positions


def from_sequences(
    sequences: Sequence, token_type_ids: Sequence | None, limits: RequestLimits, rule: PositionRule
) -> Batch:
    """Check a list of token id sequences and give them positions.

    Raises InputError, naming the sequence, for an empty request, an empty or over-long sequence, ids that are not
    integers or out of range, and token types that do not match.
    """
    if isinstance(sequences, str | bytes) or not isinstance(sequences, Sequence | np.ndarray):
        raise InputError(f"a list of token id sequences is needed, not {type(sequences).__name__}")
    if len(sequences) == 0:
        raise InputError("the request is empty: at least one sequence is needed")
    ids, cu_seqlens = _token_ids(sequences, limits)
    types = _token_types(token_type_ids, cu_seqlens, limits)
    return Batch(ids, types, ragged_positions(rule, ids, cu_seqlens), cu_seqlens)


def from_sequence(sequence: Any, token_type_ids: Any, limits: RequestLimits, rule: PositionRule) -> Batch:
    """Check one sequence as `from_sequences` does, in half the time where nothing is wrong with it."""
    array = _array(sequence) if token_type_ids is None else None
    if array is not None and array.ndim == 1 and array.dtype.kind in "iu":
        count = len(array)
        if 0 < count <= limits.max_length and array.min() >= 0 and array.max() < limits.vocab_size:
            ids, cu_seqlens = array.astype(np.int32), np.array((0, count), np.int32)
            known = rule.kind != "count_non_pad" and rule.offset + count <= len(COUNTED)
            positions = COUNTED[rule.offset : rule.offset + count] if known else ragged_positions(rule, ids, cu_seqlens)
            return Batch(
                ids, ZEROS[:count] if count <= len(ZEROS) else np.zeros(count, np.int32), positions, cu_seqlens
            )
    types = None if token_type_ids is None else [token_type_ids]
    return from_sequences([sequence], types, limits, rule)


def from_padded(
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    token_type_ids: np.ndarray | None,
    limits: RequestLimits,
    rule: PositionRule,
    *,
    contiguous: bool,
    first_token: bool,
) -> Batch:
    """Take the real tokens out of a padded matrix `(batch, length)`; padding may be anywhere the model allows.

    contiguous: refuse a mask with holes, for a model that looks at distances between tokens.
    first_token: refuse a mask that hides the first token, for a model that pools it or counts from it.

    Positions are those of the padded matrix, as PyTorch computes them, so left padding gives PyTorch's answer.
    Raises InputError.
    """
    ids, mask = _matrix(input_ids, "input_ids"), _mask(attention_mask, input_ids)
    types = _matrix(token_type_ids, "token_type_ids") if token_type_ids is not None else np.zeros_like(ids)
    if types.shape != ids.shape:
        raise InputError(f"token_type_ids has shape {types.shape}, input_ids {ids.shape}; they must be equal")
    if ids.shape[1] > limits.max_length:
        raise InputError(f"the matrix is {ids.shape[1]} tokens wide; the model allows {limits.max_length}")
    columns = tuple(np.flatnonzero(row) for row in mask)
    for i, kept in enumerate(columns):
        _check_mask_row(i, kept, contiguous, first_token)
    sequences, cu_seqlens = _token_ids([row[kept] for row, kept in zip(ids, columns, strict=True)], limits)
    kinds = _token_types([row[kept] for row, kept in zip(types, columns, strict=True)], cu_seqlens, limits)
    positions = [position_ids(rule, row)[kept] for row, kept in zip(ids, columns, strict=True)]
    return Batch(sequences, kinds, np.concatenate(positions), cu_seqlens, columns)


def check_lengths(lengths: Sequence[int], limits: RequestLimits) -> list[int]:
    """Return the lengths as plain numbers. Raises InputError for one below 1 or longer than the model allows."""
    if not len(lengths) or min(lengths) < 1:
        raise InputError(f"lengths are whole numbers of at least 1, and at least one of them, not {list(lengths)}")
    if max(lengths) > limits.max_length:
        raise InputError(f"a sequence of {max(lengths)} tokens is too long: the model allows {limits.max_length}")
    return [int(n) for n in lengths]


def _array(values: Any) -> np.ndarray | None:
    try:
        return np.asarray(values)
    except (TypeError, ValueError):  # the caller goes on to `from_sequences`, which says what is wrong
        return None


def _token_ids(sequences: Sequence, limits: RequestLimits) -> tuple[np.ndarray, np.ndarray]:
    """Return all token ids, int32 (tokens,), and their cu_seqlens. The InputError names the first bad sequence."""
    checked = _all_valid(sequences, limits.max_length, limits.vocab_size)
    if checked is None:  # one by one, to say what is wrong
        arrays = [_sequence(s, i, limits) for i, s in enumerate(sequences)]
        checked = np.concatenate(arrays), [len(a) for a in arrays]
    return checked[0], cu_seqlens_of(checked[1])


def _all_valid(parts: Sequence, longest: int, size: int) -> tuple[np.ndarray, list[int]] | None:
    """Return the values of all sequences, int32 (tokens,), and their lengths; None if anything is wrong with one."""
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


def _sequence(values: object, index: int, limits: RequestLimits) -> np.ndarray:
    array = _integers(values, f"sequence {index}")
    if array.ndim != 1:
        raise InputError(f"sequence {index} has shape {array.shape}; token ids must be one flat list")
    if len(array) == 0:
        raise InputError(f"sequence {index} is empty: at least one token is needed")
    if len(array) > limits.max_length:
        raise InputError(
            f"sequence {index} has {len(array)} tokens; the model allows {limits.max_length}: truncate it first"
        )
    _check_range(array, limits.vocab_size, f"sequence {index}: token id", "vocabulary")
    return array.astype(np.int32)


def _token_types(given: Sequence | None, cu_seqlens: np.ndarray, limits: RequestLimits) -> np.ndarray:
    """Return the token types of all sequences, int32 (tokens,); zeros where none are given. Raises InputError."""
    if given is None:
        return np.zeros(cu_seqlens[-1], np.int32)
    if not isinstance(given, Sequence | np.ndarray):
        raise InputError(f"token_type_ids must be a list with one entry per sequence, not {type(given).__name__}")
    lengths = np.diff(cu_seqlens).tolist()
    if len(given) != len(lengths):
        raise InputError(f"there are {len(given)} token_type_ids for {len(lengths)} sequences")
    size = max(limits.type_vocab_size, 1)
    checked = _all_valid(given, limits.max_length, size)
    if checked is not None and checked[1] == lengths:
        return checked[0]
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
