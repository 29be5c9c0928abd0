"""What an ONNX file takes: which of its inputs is which, and a batch in its own types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from tvm import relax, tirx

from turbo_tvm.artifact.manifest import PositionRule
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.patches import PIXELS, Size, size_of
from turbo_tvm.runtime.batch import position_ids

# Names that exporters give to inputs, by ours.
_NAMES = {
    "input_ids": ("input_ids", "input", "tokens", "ids"),
    "attention_mask": ("attention_mask", "input_mask", "mask"),
    "token_type_ids": ("token_type_ids", "segment_ids"),
    "position_ids": ("position_ids",),
}


@dataclass(frozen=True)
class OnnxInputs:
    """roles: the file's names by ours. types: their dtypes. batch, length: the numbers that the file fixes, if any.

    image: (channels, height, width) of a model of images, whose only input is pixel_values.
    """

    roles: Mapping[str, str]
    types: Mapping[str, np.dtype]
    batch: int | None
    length: int | None = None
    image: tuple[int, int, int] | None = None

    def parameters(self, batch: tirx.Var, length: tirx.Var) -> dict[str, relax.Var]:
        """What the imported function takes, by the file's names: int64 (batch, length), or fp32 pixels."""
        if self.image is not None:
            ty = relax.TensorType((batch, *self.image), "float32")
        else:
            ty = relax.TensorType((batch, length), "int64")
        return {name: relax.Var(role, ty) for role, name in self.roles.items()}

    def feed_images(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The file's input for images (batch, channels, height, width)."""
        return {self.roles[PIXELS]: pixels.astype(self.types[PIXELS])}

    def feed(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray, rule: PositionRule) -> dict[str, np.ndarray]:
        """The file's inputs for token ids, mask and token types (batch, length)."""
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if "position_ids" in self.roles:
            values["position_ids"] = np.stack([position_ids(rule, row) for row in ids.astype(np.int32)])
        return {name: values[role].astype(self.types[role]) for role, name in self.roles.items()}


def read_inputs(path: Path, model: onnx.ModelProto, image_size: Size | None = None) -> OnnxInputs:
    """The inputs of a checked model: token ids and so on, or images alone.

    image_size: of images, where the file leaves it open. Raises UnsupportedModelError for other inputs.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    given = {i.name: i.type.tensor_type for i in model.graph.input if i.name not in constants}
    if len(given) == 1 and all(len(kind.shape.dim) == 4 for kind in given.values()):
        return _images(path, model, *next(iter(given.items())), image_size)
    found = {role: next((n for n in names if n in given), None) for role, names in _NAMES.items()}
    roles = {role: name for role, name in found.items() if name is not None}
    _check_names(path, list(given), roles)
    shapes = {name: [d.dim_value or None for d in kind.shape.dim] for name, kind in given.items()}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise UnsupportedModelError(f"{path}: the input {name} has {len(shape)} dimensions, not (batch, length)")
    batch, length = (_number(path, shapes, axis) for axis in range(2))
    types = {role: helper.tensor_dtype_to_np_dtype(given[name].elem_type) for role, name in roles.items()}
    return OnnxInputs(roles, types, batch, length)


def _images(
    path: Path, model: onnx.ModelProto, name: str, kind: onnx.TypeProto.Tensor, image_size: Size | None
) -> OnnxInputs:
    batch, channels, *size = (d.dim_value or None for d in kind.shape.dim)
    channels = channels or _channels(model, name)
    if channels is None:
        raise UnsupportedModelError(f"{path} leaves open how many channels its images have, and no convolution says it")
    if image_size is None and None in size:
        raise UnsupportedModelError(
            f"{path} leaves the size of its images open: give image_size=(height, width) (--image-size)"
        )
    asked = size_of(image_size) if image_size is not None else tuple(size)
    if any(n is not None and n != m for n, m in zip(size, asked, strict=True)):
        raise UnsupportedModelError(f"{path} is for images of {size[0]} x {size[1]}; image_size={image_size} is not")
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return OnnxInputs({PIXELS: name}, {PIXELS: dtype}, batch, image=(channels, *asked))  # type: ignore[arg-type]


def _channels(model: onnx.ModelProto, image: str) -> int | None:
    """What the convolution that reads the image takes."""
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv" and n.input[0] == image]
    return next((int(weights[n.input[1]][1]) for n in convolutions if n.input[1] in weights), None)


def _check_names(path: Path, given: list[str], roles: Mapping[str, str]) -> None:
    left = [name for name in given if name not in roles.values()]
    missing = [role for role in ("input_ids", "attention_mask") if role not in roles]
    if left or missing:
        why = f"{', '.join(missing)} is missing" if missing else f"{', '.join(left)} is not known"
        raise UnsupportedModelError(
            f"{path} takes {', '.join(given)}: {why}; an encoder with input_ids, attention_mask and, if it has them, "
            "token_type_ids and position_ids is needed, or one of images (batch, channels, height, width)"
        )


def _number(path: Path, shapes: Mapping[str, list[int | None]], axis: int) -> int | None:
    numbers = {shape[axis] for shape in shapes.values()} - {None}
    if len(numbers) > 1:
        raise UnsupportedModelError(f"{path}: its inputs have different dimensions: {shapes}")
    return next(iter(numbers), None)
