"""The document says what the server does: every route is in it, and what is answered has the form it says."""

from __future__ import annotations

import re

import httpx
import jsonschema
import pytest
from starlette.routing import Route

from turbo_tvm.server.app import create_app, endpoints
from turbo_tvm.server.openapi import document
from turbo_tvm.server.settings import Settings

pytestmark = pytest.mark.xdist_group("server")

GOOD = [
    ("POST", "/embed", {"inputs": ["a", "the cat"]}),
    ("POST", "/embed", {"inputs": [5, 6]}),
    ("POST", "/models/{name}/embed", {"inputs": "a"}),
    ("POST", "/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    ("POST", "/tokenize", {"inputs": "a cat"}),
    ("POST", "/decode", {"ids": [5, 6]}),
    ("POST", "/", {"inputs": "a"}),
    ("POST", "/v1/embeddings", {"model": "embedder", "input": "a"}),
    ("POST", "/v1/embeddings", {"model": "embedder", "input": "a", "encoding_format": "base64"}),
    (
        "POST",
        "/v2/models/{name}/infer",
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
    ),
    ("POST", "/v2/repository/index", None),
    *(("GET", e.path, None) for e in endpoints() if e.method == "GET" and e.content_type == "application/json"),
]
BAD = [
    ("POST", "/embed", {"inputs": 3}, 422),
    ("POST", "/embed", {"inputs": "red " * 99}, 413),
    ("POST", "/predict", {"inputs": "a"}, 422),
    ("POST", "/v1/embeddings", {"model": "x", "input": "a"}, 404),
    ("POST", "/v1/embeddings", {"model": "embedder"}, 422),
    ("POST", "/v2/models/{name}/infer", {"inputs": []}, 400),
    ("POST", "/v2/repository/models/{name}/load", None, 405),
]


@pytest.fixture(scope="module")
def served(real):
    with httpx.Client(base_url=real.url) as client:
        yield client, client.get("/openapi.json").json()


def checked(found, path, method, status, body):
    responses = found["paths"][path][method.lower()]["responses"]
    assert str(status) in responses, f"{status} is not in the document of {method} {path}"
    schema = responses[str(status)]["content"]["application/json"]["schema"]
    jsonschema.validate(body, {**schema, "components": found["components"]})


@pytest.mark.parametrize(("method", "path", "body"), GOOD)
def test_answers_have_the_form_that_the_document_says(served, method, path, body):
    client, found = served
    place = path.replace("{name}", "embedder").replace("{version}", "1")
    reply = client.request(method, place, json=body)
    assert reply.status_code == 200, reply.text
    checked(found, path, method, 200, reply.json())


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD)
def test_errors_have_the_form_that_the_document_says(served, method, path, body, status):
    client, found = served
    reply = client.request(method, path.replace("{name}", "embedder"), json=body)
    assert reply.status_code == status
    checked(found, path, method, status, reply.json())


def test_every_route_is_in_it(served):
    _, found = served
    app = create_app(Settings(files=()))
    routes = {(route.path, method) for route in app.routes if isinstance(route, Route) for method in route.methods}
    routes = {(path, method) for path, method in routes if method != "HEAD" and path != "/openapi.json"}
    assert routes == {(path, method.upper()) for path, one in found["paths"].items() for method in one}


def test_it_is_openapi(served):
    _, found = served
    assert found["openapi"].startswith("3.1")
    ids = [one["operationId"] for path in found["paths"].values() for one in path.values()]
    assert len(ids) == len(set(ids))
    names = set(found["components"]["schemas"])
    references = set(re.findall(r"#/components/schemas/(\w+)", str(found)))
    assert references <= names
    for path, one in found["paths"].items():
        for operation in one.values():
            assert {p["name"] for p in operation["parameters"]} == set(re.findall(r"{(\w+)}", path))


def test_keys_are_in_it():
    found = document(endpoints(), keyed=True)
    assert found["security"] == [{"key": []}]
    assert found["paths"]["/health"]["get"]["security"] == []
    assert "401" in found["paths"]["/embed"]["post"]["responses"]
