"""The names of a compiled model's functions."""

from __future__ import annotations

ENCODE = "encode"  # from token ids, or patches of images, to the model's outputs: packed rows, or a padded batch
TRANSFORM_WEIGHTS = "transform_weights"  # from the model's weights to those that the kernels read; runs at compile time
