"""Read and check an ONNX file: what is wrong with it is said before anything is imported."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import checker, inliner

from turbo_tvm.errors import UnsupportedModelError, summary

OPSETS = range(11, 24)  # that are supported

_AGAIN = "export the model again"

# Operators of ONNX Runtime, and from which opset on ONNX has them itself.
_RUNTIME_OPERATORS = {"LayerNormalization": 17, "SimplifiedLayerNormalization": 99}


def load_file(path: Path) -> onnx.ModelProto:
    """Return the model with its weights, external ones too, and with its functions inlined.

    Raises UnsupportedModelError for a file that is damaged, not ONNX, of another opset, or whose external data are
    missing or of the wrong size.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{path} is not an ONNX file, or only a part of one ({summary(error)}): {_AGAIN}, or copy the file again"
        ) from error
    _check_header(path, model)
    _check_external_data(path, model)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise UnsupportedModelError(f"{path}: the weights beside it cannot be read: {summary(error)}") from error
    if model.functions:
        model = inliner.inline_local_functions(model)
    _name_domains(model)
    _check_graph(path, model)
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's operators that a model is written in; 0 if it says none."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _name_domains(model: onnx.ModelProto) -> None:
    """Add the domain to operators that ONNX Runtime writes without it."""
    opset = opset_of(model)
    ours = [n for n in model.graph.node if not n.domain and opset < _RUNTIME_OPERATORS.get(n.op_type, 0)]
    for node in ours:
        node.domain = "com.microsoft"
    if ours and all(o.domain != "com.microsoft" for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _check_header(path: Path, model: onnx.ModelProto) -> None:
    """Raise UnsupportedModelError for a file without a graph, or of an opset that is not supported."""
    if not model.HasField("graph") or not model.graph.output:
        raise UnsupportedModelError(f"{path} holds no graph: it is damaged or not an ONNX file; {_AGAIN}")
    opset = opset_of(model)
    if opset not in OPSETS:
        raise UnsupportedModelError(
            f"{path} is of ONNX opset {opset}; {OPSETS.start} to {OPSETS.stop - 1} are supported: {_AGAIN} with "
            "opset_version=17, or convert it with onnx.version_converter"
        )


def _check_external_data(path: Path, model: onnx.ModelProto) -> None:
    """Raise UnsupportedModelError for weights beside the file that are missing, outside of its folder or cut short."""
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        given = {entry.key: entry.value for entry in tensor.external_data}
        location = os.path.normpath(given.get("location", ""))
        place = path.parent / location
        if os.path.isabs(location) or location.split(os.sep)[0] == os.pardir:
            raise UnsupportedModelError(
                f"{path}: the weight {tensor.name!r} lies outside of the file's folder: {place}"
            )
        if not place.is_file():
            raise UnsupportedModelError(
                f"{path}: its weights lie in {place.name}, which is not beside it: copy that file to {path.parent} too"
            )
        wanted = _bytes_of(tensor)
        offset, length = int(given.get("offset", 0)), int(given.get("length", wanted))
        if length != wanted or offset + length > place.stat().st_size:
            raise UnsupportedModelError(
                f"{path}: the weight {tensor.name!r} needs {wanted} bytes of {place.name} from {offset} on, which has "
                f"{place.stat().st_size}: the two files do not belong together, or one is cut short; {_AGAIN}"
            )


def _bytes_of(tensor: onnx.TensorProto) -> int:
    count = 1
    for d in tensor.dims:
        count *= d
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _check_graph(path: Path, model: onnx.ModelProto) -> None:
    """Have ONNX's own checker look at the order of nodes (a cycle has none), their attributes and the tensors' sizes.

    Raises UnsupportedModelError for what it finds.
    """
    try:
        if model.ByteSize() < (1 << 31) - 1:
            checker.check_model(model)
        else:  # protobuf's limit
            checker.check_graph(model.graph)
        onnx.shape_inference.infer_shapes(_without_weights(model), strict_mode=True, data_prop=False)
    except ValueError as error:  # protobuf's limit again
        raise UnsupportedModelError(f"{path} is too large for ONNX's checker: {summary(error)}") from error
    except Exception as error:
        raise UnsupportedModelError(f"{path} is not a valid ONNX model: {_reason(error)}; {_AGAIN}") from error


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with large tensors declared instead of given: shapes follow from less."""
    small = onnx.ModelProto()
    small.CopyFrom(model) if model.ByteSize() < 1 << 24 else _copy_small(model, small)
    return small


def _copy_small(model: onnx.ModelProto, small: onnx.ModelProto) -> None:
    small.ir_version = model.ir_version
    small.opset_import.extend(model.opset_import)
    small.graph.name = model.graph.name
    small.graph.node.extend(model.graph.node)
    small.graph.output.extend(model.graph.output)
    small.graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:
        if _bytes_of(tensor) < 1 << 12:
            small.graph.initializer.append(tensor)
        elif all(tensor.name != declared.name for declared in model.graph.input):
            small.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _reason(error: Exception) -> str:
    text = summary(error)
    return f"its nodes form a cycle, or use what no node makes ({text})" if "topological" in str(error) else text
