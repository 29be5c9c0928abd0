"""gRPC messages of the Open Inference Protocol, made from a table in a descriptor pool of their own.

Field numbers and types are the protocol's. They have a pool of their own, and no generated module, because a client
library in the same process brings definitions of the same names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

_PACKAGE = "inference"
_KINDS = descriptor_pb2.FieldDescriptorProto

# Message -> fields as "number name type". Before a type, "*" is a repeated field, "map" one from strings to a message,
# and "|" one in the oneof `parameter_choice`.
_MESSAGES: dict[str, list[str]] = {
    "ServerLiveRequest": [],
    "ServerLiveResponse": ["1 live bool"],
    "ServerReadyRequest": [],
    "ServerReadyResponse": ["1 ready bool"],
    "ModelReadyRequest": ["1 name string", "2 version string"],
    "ModelReadyResponse": ["1 ready bool"],
    "ServerMetadataRequest": [],
    "ServerMetadataResponse": ["1 name string", "2 version string", "3 extensions *string"],
    "ModelMetadataRequest": ["1 name string", "2 version string"],
    "ModelMetadataResponse": [
        "1 name string",
        "2 versions *string",
        "3 platform string",
        "4 inputs *.TensorMetadata",
        "5 outputs *.TensorMetadata",
    ],
    "ModelMetadataResponse.TensorMetadata": ["1 name string", "2 datatype string", "3 shape *int64"],
    "InferParameter": [
        "1 bool_param |bool",
        "2 int64_param |int64",
        "3 string_param |string",
        "4 double_param |double",
        "5 uint64_param |uint64",
    ],
    "InferTensorContents": [
        "1 bool_contents *bool",
        "2 int_contents *int32",
        "3 int64_contents *int64",
        "4 uint_contents *uint32",
        "5 uint64_contents *uint64",
        "6 fp32_contents *float",
        "7 fp64_contents *double",
        "8 bytes_contents *bytes",
    ],
    "ModelInferRequest": [
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        "4 parameters map InferParameter",
        "5 inputs *.InferInputTensor",
        "6 outputs *.InferRequestedOutputTensor",
        "7 raw_input_contents *bytes",
    ],
    "ModelInferRequest.InferInputTensor": [
        "1 name string",
        "2 datatype string",
        "3 shape *int64",
        "4 parameters map InferParameter",
        "5 contents InferTensorContents",
    ],
    "ModelInferRequest.InferRequestedOutputTensor": ["1 name string", "2 parameters map InferParameter"],
    "ModelInferResponse": [
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        "4 parameters map InferParameter",
        "5 outputs *.InferOutputTensor",
        "6 raw_output_contents *bytes",
    ],
    "ModelInferResponse.InferOutputTensor": [
        "1 name string",
        "2 datatype string",
        "3 shape *int64",
        "4 parameters map InferParameter",
        "5 contents InferTensorContents",
    ],
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    made = descriptor_pb2.FileDescriptorProto(name="turbo_tvm/open_inference.proto", package=_PACKAGE, syntax="proto3")
    found: dict[str, Any] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = found[outer].nested_type.add(name=name) if outer else made.message_type.add(name=name)
        found[path] = message
        for field in fields:
            _add_field(message, path, *field.split(" ", 2))
    return made


def _add_field(message: Any, path: str, number: str, name: str, kind: str) -> None:
    field = message.field.add(name=name, number=int(number), label=_KINDS.LABEL_OPTIONAL)
    if kind.startswith("map "):
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, f"{path}.{entry.name}", "1", "key", "string")
        _add_field(entry, f"{path}.{entry.name}", "2", "value", kind[4:])
        field.label, field.type = _KINDS.LABEL_REPEATED, _KINDS.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{path}.{entry.name}"
        return
    if kind.startswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index, kind = 0, kind[1:]
    if kind.startswith("*"):
        field.label, kind = _KINDS.LABEL_REPEATED, kind[1:]
    scalar = getattr(_KINDS, f"TYPE_{kind.upper()}", None)
    if scalar is not None:
        field.type = scalar
    else:
        field.type, field.type_name = _KINDS.TYPE_MESSAGE, f".{_PACKAGE}.{f'{path}{kind}' if kind[0] == '.' else kind}"


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def message(name: str) -> Any:
    """Return the class of the message with this name."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
