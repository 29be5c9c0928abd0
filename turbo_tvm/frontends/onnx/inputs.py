"""Find out what an ONNX file takes: which of its inputs is which, and how to feed them."""

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
from turbo_tvm.frontends.options import Size, size_of
from turbo_tvm.ops.inputs import InputKind
from turbo_tvm.runtime.batch import position_ids

# Names that exporters give to inputs.
_NAMES = {
    InputKind.TOKEN_IDS: ("input_ids", "input", "tokens", "ids"),
    InputKind.ATTENTION_MASK: ("attention_mask", "input_mask", "mask"),
    InputKind.TOKEN_TYPE_IDS: ("token_type_ids", "segment_ids"),
    InputKind.POSITION_IDS: ("position_ids",),
}


@dataclass(frozen=True)
class OnnxInputs:
    """What a file takes: texts, or images alone."""

    names: Mapping[InputKind, str]  # the file's own names of its inputs
    types: Mapping[InputKind, np.dtype]  # their dtypes
    batch: int | None  # that the file fixes, if it does
    length: int | None = None  # that the file fixes, in tokens, if it does
    image: tuple[int, int, int] | None = None  # (channels, height, width) of a model of images

    def parameters(self, batch: tirx.Var, length: tirx.Var) -> dict[str, relax.Var]:
        """Return the parameters of the imported function by the file's names: int64 (batch, length), or fp32 pixels."""
        if self.image is not None:
            ty = relax.TensorType((batch, *self.image), "float32")
        else:
            ty = relax.TensorType((batch, length), "int64")
        return {name: relax.Var(kind.parameter, ty) for kind, name in self.names.items()}

    def feed_images(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return the file's input for images, fp32 (batch, channels, height, width), in its own dtype."""
        return self._feed({InputKind.PIXELS: pixels})

    def feed(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray, rule: PositionRule) -> dict[str, np.ndarray]:
        """Return the file's inputs for token ids, mask and token types, int64 (batch, length), in its own dtypes."""
        values = {InputKind.TOKEN_IDS: ids, InputKind.ATTENTION_MASK: mask, InputKind.TOKEN_TYPE_IDS: types}
        if InputKind.POSITION_IDS in self.names:
            values[InputKind.POSITION_IDS] = np.stack([position_ids(rule, row) for row in ids.astype(np.int32)])
        return self._feed(values)

    def _feed(self, values: Mapping[InputKind, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values[kind].astype(self.types[kind]) for kind, name in self.names.items()}


def read_inputs(path: Path, model: onnx.ModelProto, image_size: Size | None = None) -> OnnxInputs:
    """Return the inputs of a checked model: token ids and so on, or images alone.

    path: of the file, for errors.
    image_size: of images, where the file leaves it open.

    Raises UnsupportedModelError for other inputs.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    given = {i.name: i.type.tensor_type for i in model.graph.input if i.name not in constants}
    if len(given) == 1 and all(len(declared.shape.dim) == 4 for declared in given.values()):
        return _images(path, model, *next(iter(given.items())), image_size)
    found = {kind: next((n for n in candidates if n in given), None) for kind, candidates in _NAMES.items()}
    names = {kind: name for kind, name in found.items() if name is not None}
    _check_names(path, list(given), names)
    shapes = {name: [d.dim_value or None for d in declared.shape.dim] for name, declared in given.items()}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise UnsupportedModelError(f"{path}: the input {name} has {len(shape)} dimensions, not (batch, length)")
    batch, length = (_number(path, shapes, axis) for axis in range(2))
    types = {kind: helper.tensor_dtype_to_np_dtype(given[name].elem_type) for kind, name in names.items()}
    return OnnxInputs(names, types, batch, length)


def _images(
    path: Path, model: onnx.ModelProto, name: str, declared: onnx.TypeProto.Tensor, image_size: Size | None
) -> OnnxInputs:
    """Return the only input, images of one size. Raises UnsupportedModelError if the file and image_size disagree."""
    batch, channels, *size = (d.dim_value or None for d in declared.shape.dim)
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
    types = {InputKind.PIXELS: helper.tensor_dtype_to_np_dtype(declared.elem_type)}
    return OnnxInputs({InputKind.PIXELS: name}, types, batch, image=(channels, *asked))  # type: ignore[arg-type]


def _channels(model: onnx.ModelProto, image: str) -> int | None:
    """Return how many channels the convolution that reads the image takes; None if there is none."""
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv" and n.input[0] == image]
    return next((int(weights[n.input[1]][1]) for n in convolutions if n.input[1] in weights), None)


def _check_names(path: Path, given: list[str], names: Mapping[InputKind, str]) -> None:
    """Raise UnsupportedModelError for inputs that are not known, or if one that is needed is missing."""
    left = [name for name in given if name not in names.values()]
    missing = [k.parameter for k in (InputKind.TOKEN_IDS, InputKind.ATTENTION_MASK) if k not in names]
    if left or missing:
        why = f"{', '.join(missing)} is missing" if missing else f"{', '.join(left)} is not known"
        raise UnsupportedModelError(
            f"{path} takes {', '.join(given)}: {why}; an encoder with input_ids, attention_mask and, if it has them, "
            "token_type_ids and position_ids is needed, or one of images (batch, channels, height, width)"
        )


def _number(path: Path, shapes: Mapping[str, list[int | None]], axis: int) -> int | None:
    """Return the extent of an axis that the file fixes, the same for all inputs; None if it fixes none."""
    numbers = {shape[axis] for shape in shapes.values()} - {None}
    if len(numbers) > 1:
        raise UnsupportedModelError(f"{path}: its inputs have different dimensions: {shapes}")
    return next(iter(numbers), None)
