"""JSON bodies of KServe v2 over HTTP: what requests are decoded as, and what the OpenAPI document shows of answers."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Parameters = dict[str, Any]


class InputTensor(msgspec.Struct):
    """One input of a request."""

    name: str
    shape: list[Dimension]
    datatype: str
    data: list[Any] | None = None  # flat or nested, row by row; None where it follows the JSON in bytes
    parameters: Parameters = {}  # `binary_data_size`: how many bytes follow


class RequestedOutput(msgspec.Struct):
    """An output that a request names."""

    name: str
    parameters: Parameters = {}  # `binary_data`: whether to send it in bytes


class InferRequest(msgspec.Struct):
    """A request for one run of a model."""

    inputs: list[InputTensor]
    id: str = ""
    outputs: list[RequestedOutput] | None = None
    parameters: Parameters = {}


class OutputTensor(msgspec.Struct):
    """One output of an answer; its data are row by row, or in bytes after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: Parameters = {}


class InferResponse(msgspec.Struct):
    """The outputs that were asked for."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""


class TensorMetadata(msgspec.Struct):
    """The form of an input or output; -1 stands for a dimension that a request chooses."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(msgspec.Struct):
    """The name, version and extensions of this server."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(msgspec.Struct):
    """Whether the server is up."""

    live: bool


class ServerReady(msgspec.Struct):
    """Whether requests are answered."""

    ready: bool
    name: str = ""


class ModelIndex(msgspec.Struct):
    """A model, and whether it is loaded."""

    name: str
    version: str
    state: str
    reason: str
