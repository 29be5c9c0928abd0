"""Outputs of a model's own call: by name, padded again, as torch tensors or NumPy arrays like what was passed in."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from turbo_tvm.artifact.manifest import OutputSpec
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import Batch


class ModelOutput(dict):
    """The outputs of a model by name; `out.logits`, `out["logits"]` and `out[0]` are the same, as in transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model has no output {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def to_matrix(spec: OutputSpec, parts: list[np.ndarray], batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
    """Return the answers to a padded matrix of this shape as one array over the batch, padded again with 0."""
    if spec.kind == "sequence" or batch.columns is None:
        return np.stack(parts)
    matrix = np.zeros((*shape, *parts[0].shape[1:]), np.float32)
    for row, columns, part in zip(matrix, batch.columns, parts, strict=True):
        row[columns] = part
    return matrix


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any) -> Any:
    """Return an array for a torch tensor, or for what NumPy makes one of; None for None.

    Raises InputError for a tensor on another device or of a type that NumPy does not have.
    """
    if not _is_torch(value):
        return value if value is None else np.asarray(value)
    if value.device.type != "cpu":
        raise InputError(f"the tensor is on {value.device}; the compiled model runs on the CPU: call .cpu() first")
    try:
        return value.detach().numpy()
    except TypeError as error:  # bfloat16 and other types that NumPy does not have
        raise InputError(
            f"a {value.dtype} tensor holds no token ids or mask: use torch.int64, or torch.float32 for images"
        ) from error


def like(value: np.ndarray, example: Any) -> Any:
    """Return the array as a torch tensor if the example is one."""
    return sys.modules["torch"].from_numpy(value) if _is_torch(example) else value
