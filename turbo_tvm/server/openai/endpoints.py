"""OpenAI's endpoints: embeddings and models."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import msgspec
import numpy as np

from turbo_tvm.server import embeddings
from turbo_tvm.server.embeddings import Inputs
from turbo_tvm.server.endpoint import Call, Endpoint, Protocol, Reply, json_reply
from turbo_tvm.server.errors import openai_form
from turbo_tvm.server.model_service import ModelService

OPENAI = Protocol("openai", openai_form)


class EmbeddingsRequest(msgspec.Struct):
    """Asks for embeddings. Texts beyond the model's longest sequence are refused."""

    model: str
    input: Inputs  # a text, texts, token ids or lists of them
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    user: str | None = None


class Embedding(msgspec.Struct):
    """A vector: a list of numbers, or its little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(msgspec.Struct):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(msgspec.Struct):
    """The vectors, in order."""

    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


class Model(msgspec.Struct):
    """A model of the server."""

    id: str
    created: int
    owned_by: str
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """All models."""

    data: list[Model]
    object: Literal["list"] = "list"


async def _embeddings(call: Call) -> Reply:
    body: EmbeddingsRequest = call.body
    model = call.context.repository.get(body.model)
    requests = await embeddings.requests_of(call, model, body.input, "input")
    embeddings.check_whole(model, requests)
    vectors = embeddings.shortened(await embeddings.embed(call, model, requests), body.dimensions)
    tokens = sum(len(one.ids) for one in requests)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_reply({"object": "list", "data": data, "model": model.name, "usage": usage})


def _encoded(vector: np.ndarray, form: str) -> np.ndarray | str:
    if form == "float":
        return vector
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def _models(call: Call) -> Reply:
    return json_reply({"object": "list", "data": [_model(model) for model in call.context.repository]})


async def _one_model(call: Call) -> Reply:
    return json_reply(_model(call.context.repository.get(call.path["name"])))


def _model(model: ModelService) -> dict[str, object]:
    return {"id": model.name, "object": "model", "created": int(model.started), "owned_by": "turbo_tvm"}


ENDPOINTS = [
    Endpoint(
        "POST",
        "/v1/embeddings",
        OPENAI,
        _embeddings,
        "Embed texts or token ids",
        body=EmbeddingsRequest,
        answer=EmbeddingsResponse,
        statuses=(404, 424),
    ),
    Endpoint("GET", "/v1/models", OPENAI, _models, "All models", answer=ModelList),
    Endpoint("GET", "/v1/models/{name}", OPENAI, _one_model, "A model", answer=Model, statuses=(404,)),
]
