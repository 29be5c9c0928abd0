"""Convert ONNX operators that take a shape or bounds as an operand, and those that TVM's frontend lacks.

A converter takes the graph that is being imported, the node's inputs (None, known values or expressions) and its
attributes, and returns its results, or None to leave the node to TVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from turbo_tvm.frontends.onnx.extents import broadcast
from turbo_tvm.frontends.onnx.operands import Attributes, Operator, Results
from turbo_tvm.frontends.onnx.values import is_known
from turbo_tvm.frontends.tile import tile
from turbo_tvm.passes.rewriter import shape_of

if TYPE_CHECKING:
    from turbo_tvm.frontends.onnx.graph import OnnxGraph

_ENDLESS = 1 << 30  # a bound of a slice beyond it is the end
_LIMIT = 32  # a bound of a slice from here on is a limit of the length, in tokens


def _reshape(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, shape = graph.expression(inputs[0]), inputs[1]
    if not is_known(shape):
        return None
    source = shape_of(x)
    target = graph.loosen.reshape(source, list(shape.reshape(-1)))
    wanted = [source[i] if _is(d, 0) and not attrs.get("allowzero", 0) else d for i, d in enumerate(target)]
    if any(_is(d, -1) for d in wanted):
        rest = [d for d in wanted if not _is(d, -1)]
        wanted = [graph.values.quotient(source, rest) if _is(d, -1) else d for d in wanted]
    return [relax.op.reshape(x, _dims(wanted))]


def _flatten(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x = inputs[0]
    dims, axis = shape_of(x), attrs.get("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return [relax.op.reshape(x, [graph.values.quotient(part, []) for part in (dims[:axis], dims[axis:])])]


def _expand(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, shape = graph.expression(inputs[0]), inputs[1]
    if not is_known(shape):
        return None
    return [relax.op.broadcast_to(x, _dims(broadcast(shape_of(x), graph.loosen.shape(list(shape)))))]


def _constant_of_shape(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    if not is_known(inputs[0]):
        return None
    from onnx import numpy_helper

    value = numpy_helper.to_array(attrs["value"]) if "value" in attrs else np.zeros(1, np.float32)
    return [relax.op.full(_dims(graph.loosen.shape(list(inputs[0]))), relax.const(value.reshape(())), str(value.dtype))]


def _range(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    if not all(is_known(x) for x in inputs):
        return None
    start, stop, step = (x.reshape(-1)[0] for x in inputs)
    (stop,) = graph.loosen.shape([0, stop])[1:]
    if any(isinstance(x, float | np.floating) for x in (start, stop, step)):
        return None
    return [relax.op.arange(*_dims([start, stop, step]), "int64")]


def _slice(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert a slice with known bounds; what is cut to the length must be long enough for it (`OnnxGraph.sliced`)."""
    x, bounds = graph.expression(inputs[0]), inputs[1:]
    if not all(b is None or is_known(b) for b in bounds):
        return None
    dims = shape_of(x)
    starts, ends = (list(b.reshape(-1)) for b in bounds[:2])
    axes = [int(a) % len(dims) for a in bounds[2]] if len(bounds) > 2 and bounds[2] is not None else range(len(starts))
    steps = [int(s) for s in bounds[3]] if len(bounds) > 3 and bounds[3] is not None else [1] * len(starts)
    if any(s != 1 for s in steps):
        return None
    cut: list[tuple[int, Any, Any]] = []
    for axis, start, end in zip(axes, starts, ends, strict=True):
        begin, stop = (_bound(graph, d, dims[axis]) for d in (start, end))
        if _is(begin, 0) and _same(stop, dims[axis]):
            continue
        if isinstance(dims[axis], int) and not isinstance(stop, int):
            graph.sliced.append(dims[axis] - (begin if isinstance(begin, int) else 0))
        cut.append((axis, begin, stop))
    if not cut:
        return [x]
    where, begins, stops = ([*part] for part in zip(*cut, strict=True))
    return [relax.op.strided_slice(x, where, _dims(begins), _dims(stops), assume_inbound=True)]


def _bound(graph: OnnxGraph, value: Any, extent: Any) -> Any:
    """Return a bound of a slice as ONNX means it: negative from the end, and never past it.

    Of a symbolic extent a bound of some size is taken to be one of the length, as where tokens are cut to 512.
    """
    if not isinstance(value, int | np.integer):
        return value
    value = int(value)
    if isinstance(extent, int):
        return max(0, extent + value) if value < 0 else min(value, extent)
    if value > _ENDLESS or value < -_ENDLESS:
        return extent if value > 0 else 0
    if graph.loosen.is_length(value):
        return extent
    if value >= _LIMIT:
        graph.sliced.append(value)
        return extent
    if value in (0, 1):
        return value
    if value == -1:
        return graph.values.simplify(extent - 1)
    raise ValueError(f"it cuts what is as long as the sequence at {value}, which may be beyond its end")


def _gather(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert a look-up by numbers, or of rows of a weight.

    Ids that are looked up in a weight are checked before anything runs, so that none counts from the end.
    """
    data, ids, axis = graph.expression(inputs[0]), inputs[1], attrs.get("axis", 0)
    if is_known(ids):
        extent = shape_of(data)[axis]
        whole = graph.loosen.all_tokens(ids, shape_of(data)) if axis == 0 else None
        if whole is not None:
            return [relax.op.reshape(data, whole)]
        if ids.size > 1:
            return None if ids.dtype == object or ids.min() < 0 else [_take(data, graph.expression(ids), axis)]
        if ids.dtype == object or (ids.min(initial=0) < 0 and not isinstance(extent, int)):
            return None
        index = np.where(ids < 0, ids + (extent if isinstance(extent, int) else 0), ids)
        return [_take(data, relax.const(index, "int64"), axis)]
    return [_take(data, ids, 0)] if axis == 0 and graph.is_weight(data) else None


def _gather_nd(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert what looks everything up in its place, as files of a fixed batch do; anything else is TVM's."""
    data, ids = graph.expression(inputs[0]), inputs[1]
    dims = shape_of(data)
    if not is_known(ids) or ids.dtype == object or len(dims) != 2 or ids.shape[-1] != 2 or attrs.get("batch_dims", 0):
        return None
    place = ids[..., 0] * (graph.loosen.sequence or 0) + ids[..., 1]
    whole = graph.loosen.all_tokens(place, [graph.values.simplify(dims[0] * dims[1])])
    return None if whole is None else [relax.op.reshape(data, whole)]


def _tile(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    if not is_known(inputs[1]):
        return None
    return [tile(graph.emit, graph.expression(inputs[0]), _dims(list(inputs[1])))]


def _clip(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert a clip with known bounds, which are inputs from opset 11 on."""
    bounds = [*inputs[1:], None, None][:2]
    if not all(b is None or (is_known(b) and b.dtype != object) for b in bounds):
        return None
    x = graph.expression(inputs[0])
    for bound, op in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
        if bound is not None:
            x = graph.emit(op(x, relax.const(bound.reshape(()), str(bound.dtype))))
    return [x]


def _dropout(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Return the input: nothing is dropped where nothing is trained."""
    training = len(inputs) > 2 and inputs[2] is not None and not (is_known(inputs[2]) and not inputs[2].any())
    return None if training else [inputs[0]]


def _softmax(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert a softmax over the last axis.

    Before opset 13 it is one of a matrix with all later axes in its columns: the same if there is one such axis.
    """
    x = graph.expression(inputs[0])
    rank = len(shape_of(x))
    last = attrs.get("axis", -1 if graph.opset >= 13 else 1) % rank == rank - 1
    return [relax.op.nn.softmax(x, axis=-1)] if last else None


def _take(data: relax.Expr, ids: relax.Expr, axis: int) -> relax.Expr:
    return relax.op.take(data, ids, axis=axis, mode="clip")


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | np.integer) and int(value) == number


def _same(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, int) and isinstance(b, int) else not isinstance(a, int) and a.same_as(b)


def _dims(values: Sequence[Any]) -> list[Any]:
    return [int(d) if isinstance(d, int | np.integer) else d for d in values]


# Converters by domain and operator.
OPERATORS: dict[tuple[str, str], Operator] = {
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _flatten,
    ("", "Expand"): _expand,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Range"): _range,
    ("", "Slice"): _slice,
    ("", "Tile"): _tile,
    ("", "Clip"): _clip,
    ("", "Dropout"): _dropout,
    ("", "Softmax"): _softmax,
    ("", "Gather"): _gather,
    ("", "GatherND"): _gather_nd,
}
