"""The formula of disentangled attention in float64, and whether a graph's values are its values.

score(i, j) = scale * (q_i . k_j + q_i . A[bucket(i - j)] + k_j . B[bucket(i - j)])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEYS, QUERIES = TERMS = ("key", "query")  # what A and B stand in for: A is met by queries, B by keys
_AGREE = 1e-4  # of the largest value


@dataclass(frozen=True)
class Sample:
    """An attention's operands and what a graph makes of them.

    mask: bool (batch, length). q, k, v, out: (batch, heads, length, head_dim). weights: by term (A or B) its columns
    by bucket, (batch or 1, heads, head_dim, buckets). buckets: by term, as the graph gathers them, (..., length,
    length), over queries and keys for A, over keys and queries for B. scores: (batch, heads, length, length).
    """

    mask: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    weights: dict[str, np.ndarray]
    buckets: dict[str, np.ndarray]
    scores: np.ndarray
    out: np.ndarray


@dataclass(frozen=True)
class Measured:
    """scale, and by term the bucket of every distance, int64 (2 * length - 1,), from 1 - length on."""

    scale: float
    buckets: dict[str, np.ndarray]


def measure(sample: Sample) -> Measured | None:
    """The scale and the buckets with which the formula gives the sample's scores and result; None if none do."""
    found = {term: _square(buckets, term) for term, buckets in sample.buckets.items()}
    squares = {term: square for term, square in found.items() if square is not None}
    if len(squares) < len(found):
        return None
    products = sample.q @ sample.k.transpose(0, 1, 3, 2)
    for term, square in squares.items():
        products = products + _picked(sample, term, square)
    real = np.broadcast_to(sample.mask[:, None, :, None] & sample.mask[:, None, None, :], products.shape)
    scale = float((sample.scores[real] * products[real]).sum() / (products[real] ** 2).sum())
    weights = np.exp(scale * (products - products.max(-1, keepdims=True))) * sample.mask[:, None, None, :]
    out = (weights / weights.sum(-1, keepdims=True)) @ sample.v
    rows = np.broadcast_to(sample.mask[:, None, :, None], out.shape)
    if not (_close(sample.scores[real], scale * products[real]) and _close(sample.out[rows], out[rows])):
        return None
    distances = {term: np.concatenate([square[0, :0:-1], square[:, 0]]) for term, square in squares.items()}
    return Measured(float(np.float32(scale)), {term: d.astype("int64") for term, d in distances.items()})


def _square(buckets: np.ndarray, term: str) -> np.ndarray | None:
    """The buckets over query i and key j, (length, length), or None if they depend on more than i - j."""
    squares = buckets.reshape(-1, *buckets.shape[-2:])
    square = squares[0] if term == KEYS else squares[0].T
    alike = (squares == squares[:1]).all() and (square[1:, 1:] == square[:-1, :-1]).all()
    return square if alike else None


def _picked(sample: Sample, term: str, square: np.ndarray) -> np.ndarray:
    """A term of every pair of query and key: (batch, heads, length, length)."""
    weights = sample.weights[term].astype("float64")
    if term == KEYS:
        by_bucket = sample.q @ weights
        return np.take_along_axis(by_bucket, np.broadcast_to(square, sample.scores.shape), -1)
    by_bucket = (sample.k @ weights).transpose(0, 1, 3, 2)
    return np.take_along_axis(by_bucket, np.broadcast_to(square, sample.scores.shape), -2)


def _close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(abs(got - wanted).max() <= _AGREE * abs(wanted).max())
