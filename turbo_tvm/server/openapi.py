"""The OpenAPI document, made of the list of endpoints and the types of their bodies and answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from turbo_tvm import __version__
from turbo_tvm.server.endpoint import JSON, Endpoint

_REFERENCE = "#/components/schemas/{name}"
_ALWAYS = (401,)
_WITH_BODY = (400, 408, 413, 422, 429, 503, 504)
_TITLES = {"kserve": "Open Inference Protocol", "openai": "OpenAI", "tei": "text-embeddings-inference"}


def document(endpoints: Sequence[Endpoint], keyed: bool) -> dict[str, Any]:
    """Return the document of these endpoints. keyed: whether the server needs a key."""
    types = list({_key(t): t for e in endpoints for t in (e.body, e.described, e.answer) if t is not None}.values())
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    known = {_key(t): schema for t, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, known, keyed)
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "turbo_tvm",
            "version": __version__,
            "summary": "Compiled transformers, served without padding",
        },
        "paths": paths,
        "components": {"schemas": {**components, **_ERRORS}},
    }
    if keyed:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _key(kind: Any) -> str:
    return repr(kind)


def _operation(endpoint: Endpoint, known: dict[str, Any], keyed: bool) -> dict[str, Any]:
    made: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method}{endpoint.path}").strip("_").lower(),
        "tags": [_TITLES.get(endpoint.protocol.name, "server")],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", endpoint.path)
        ],
        "responses": _responses(endpoint, known, keyed),
    }
    if endpoint.open:
        made["security"] = []
    body = endpoint.body or endpoint.described
    if body is not None:
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": known[_key(body)]}}}
    return made


def _responses(endpoint: Endpoint, known: dict[str, Any], keyed: bool) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "The answer"}
    if endpoint.answer is not None:
        good["content"] = {JSON: {"schema": known[_key(endpoint.answer)]}}
    elif endpoint.content_type != JSON:
        good["content"] = {endpoint.content_type: {"schema": {"type": "string"}}}
    statuses = set(endpoint.statuses) | ({400, 404} if "{" in endpoint.path else {400})
    if endpoint.method == "POST":
        statuses |= set(_WITH_BODY)
    if keyed and not endpoint.open:
        statuses |= set(_ALWAYS)
    found = {"200": good}
    for status in sorted(statuses):
        reference = {"$ref": _REFERENCE.format(name=_error_name(endpoint))}
        if status == 503 and endpoint.answer is not None and endpoint.quiet and endpoint.protocol.name == "kserve":
            reference = known[_key(endpoint.answer)]
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": reference}}}
    return found


def _error_name(endpoint: Endpoint) -> str:
    return {"openai": "OpenAIError", "tei": "InferenceError"}.get(endpoint.protocol.name, "Error")


_TEXT = {"type": "string"}
_ERRORS = {
    "Error": {"type": "object", "properties": {"error": _TEXT}, "required": ["error"]},
    "InferenceError": {
        "type": "object",
        "properties": {"error": _TEXT, "error_type": _TEXT},
        "required": ["error", "error_type"],
    },
    "OpenAIError": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["integer", "string", "null"]},
                },
                "required": ["message", "type"],
            }
        },
        "required": ["error"],
    },
}
