"""Requests of random content, to measure a model with where no texts or images are at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbo_tvm.artifact.manifest import RequestLimits
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.images import random_images
from turbo_tvm.runtime.validation import check_lengths


def random_sequences(lengths: Sequence[int], limits: RequestLimits, seed: int) -> list[np.ndarray]:
    """Return token ids, int32 (length,) each, or images if the model takes them.

    Raises InputError for lengths that the model cannot answer; an image has one length only.
    """
    check_lengths(lengths, limits)
    if limits.image is not None:
        if min(lengths) < limits.max_length:
            raise InputError(f"an image of this model is {limits.max_length} tokens, and not {min(lengths)}")
        return random_images(len(lengths), limits.image, seed)
    rng = np.random.default_rng(seed)
    return [rng.integers(0, limits.vocab_size, length, np.int32) for length in lengths]
