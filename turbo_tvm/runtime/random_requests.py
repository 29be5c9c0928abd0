"""Requests of random content: what a model is measured on where nobody has texts or images at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbo_tvm.artifact.manifest import Bounds
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import check_lengths
from turbo_tvm.runtime.images import random_images


def random_sequences(lengths: Sequence[int], bounds: Bounds, seed: int) -> list[np.ndarray]:
    """Return token ids, int32 (length,) each; or images, if the model takes them: all of its lengths are one then."""
    check_lengths(lengths, bounds)
    if bounds.image is not None:
        if min(lengths) < bounds.max_length:
            raise InputError(f"an image of this model is {bounds.max_length} tokens, and not {min(lengths)}")
        return random_images(len(lengths), bounds.image, seed)
    rng = np.random.default_rng(seed)
    return [rng.integers(0, bounds.vocab_size, length, np.int32) for length in lengths]
