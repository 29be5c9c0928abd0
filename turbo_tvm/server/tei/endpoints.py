"""text-embeddings-inference's endpoints: of the server's first model, and under /models/NAME/... of the one named."""

from __future__ import annotations

from typing import Any

import msgspec

from turbo_tvm import __version__
from turbo_tvm.server import embeddings, errors
from turbo_tvm.server.endpoint import Call, Endpoint, Protocol, Reply, decoded, json_reply
from turbo_tvm.server.errors import Problem, tei_form
from turbo_tvm.server.model_service import ModelService
from turbo_tvm.server.tei.classification import predict, predictions, rerank, text_options
from turbo_tvm.server.tei.types import (
    DecodeRequest,
    EmbedAllRequest,
    EmbedRequest,
    Info,
    Prediction,
    PredictRequest,
    Rank,
    RerankRequest,
    RootRequest,
    SimilarityInputs,
    SimilarityParameters,
    SimilarityRequest,
    Token,
    TokenizeRequest,
)

TEI = Protocol("tei", tei_form)
_MOST_TOKENIZED = 1 << 20  # characters whose tokens are listed


async def _embed(call: Call) -> Reply:
    body: EmbedRequest = call.body
    model = call.named_model
    requests = await embeddings.requests_of(call, model, body.inputs, "inputs", text_options(body))
    if not body.truncate:
        embeddings.check_whole(model, requests)
    vectors = embeddings.shortened(await embeddings.embed(call, model, requests), body.dimensions)
    return json_reply([embeddings.unit(vector) if body.normalize else vector for vector in vectors])


async def _embed_all(call: Call) -> Reply:
    body: EmbedAllRequest = call.body
    model = call.named_model
    spec = model.token_rows
    if spec is None:
        raise Problem(errors.UNPROCESSABLE, f"the model {model.name} gives no vector per token")
    requests = await embeddings.requests_of(call, model, body.inputs, "inputs", text_options(body))
    if not body.truncate:
        embeddings.check_whole(model, requests)
    return json_reply(await model.answer(requests, embeddings.deadline_of(call), spec.name))


async def _similarity(call: Call) -> Reply:
    body: SimilarityRequest = call.body
    return json_reply(await _similarities(call, body.inputs, body.parameters))


async def _similarities(call: Call, inputs: SimilarityInputs, how: SimilarityParameters) -> list[float]:
    embeddings.check_count(call, len(inputs.sentences), "sentences")
    model = call.named_model
    embeddings.need_tokenizer(model)
    requests = await model.tokenization.tokenize(
        [inputs.source_sentence, *inputs.sentences], embeddings.deadline_of(call), text_options(how)
    )
    if not how.truncate:
        embeddings.check_whole(model, requests)
    first, *others = map(embeddings.unit, await embeddings.embed(call, model, requests))
    return [float(first @ other) for other in others]


async def _tokenize(call: Call) -> Reply:
    body: TokenizeRequest = call.body
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    embeddings.check_count(call, len(texts), "inputs")
    model = call.named_model
    embeddings.need_tokenizer(model)
    if sum(map(len, texts)) > _MOST_TOKENIZED:
        raise Problem(errors.TOO_LARGE, f"inputs have more than {_MOST_TOKENIZED:,} characters: send fewer")
    deadline = embeddings.deadline_of(call)
    return json_reply(await model.tokenization.encodings(texts, body.add_special_tokens, _tokens, deadline))


def _tokens(encoding: Any) -> list[dict[str, Any]]:
    parts = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True)
    return [
        {
            "id": number,
            "text": text,
            "special": bool(special),
            "start": None if special else begin,
            "stop": None if special else end,
        }
        for number, text, special, (begin, end) in parts
    ]


async def _decode(call: Call) -> Reply:
    body: DecodeRequest = call.body
    model = call.named_model
    embeddings.need_tokenizer(model)
    single = bool(body.ids) and all(isinstance(one, int) for one in body.ids)
    if not single and any(isinstance(one, int) for one in body.ids):
        raise Problem(errors.UNPROCESSABLE, "ids mixes numbers and lists: send one sequence, or a list of them")
    listed: list[Any] = [body.ids] if single else body.ids
    embeddings.check_count(call, len(listed), "ids")
    return json_reply(await model.tokenization.decode(listed, body.skip_special_tokens, embeddings.deadline_of(call)))


async def _info(call: Call) -> Reply:
    model, settings = call.named_model, call.context.settings
    manifest = model.model.manifest
    info = Info(
        model_id=model.name,
        model_dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[manifest.precision],
        model_type=_kind(model),
        max_concurrent_requests=settings.max_queue,
        max_input_length=model.max_length,
        max_batch_tokens=model.engine.limits.max_tokens,
        max_batch_requests=settings.max_batch,
        max_client_batch_size=settings.max_inputs,
        auto_truncate=False,
        tokenization_workers=1,
        version=__version__,
    )
    return json_reply(msgspec.to_builtins(info))


def _kind(model: ModelService) -> dict[str, Any]:
    if model.scores is None:
        return {"embedding": {}}
    labels = model.labels
    named = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    return {"reranker" if len(labels) == 1 else "classifier": named}


async def health(call: Call) -> Reply:
    """Answer with an empty object where requests are answered. Raises Problem, with status 503, otherwise."""
    if not call.context.is_ready:
        raise Problem(errors.UNAVAILABLE, "the server is about to stop, or has no model")
    return json_reply({})


async def _root(call: Call) -> Reply:
    """Answer with what the model does by default: embeddings, predictions or similarities."""
    inputs, model = call.body.inputs, call.named_model
    if isinstance(inputs, dict):
        body = _converted({"inputs": inputs, "parameters": call.body.parameters}, SimilarityRequest)
        return json_reply(await _similarities(call, body.inputs, body.parameters))
    flat = {**decoded(_ANY, call.raw), **call.body.parameters}
    if model.scores is not None:
        return json_reply(await predictions(call, _converted(flat, PredictRequest), nested=True))
    call.body = _converted(flat, EmbedRequest)
    return await _embed(call)


_ANY = msgspec.json.Decoder(dict)


def _converted(plain: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise Problem(errors.UNPROCESSABLE, str(error)) from None


_STATUSES = (424,)  # of errors beside those of every endpoint


def _post(path: str, handle: Any, summary: str, body: Any, answer: Any) -> Endpoint:
    return Endpoint("POST", path, TEI, handle, summary, body=body, answer=answer, statuses=_STATUSES)


def _endpoints(prefix: str) -> list[Endpoint]:
    """Return the endpoints of a model: of the first one with an empty prefix."""
    return [
        _post(f"{prefix}/embed", _embed, "A vector per text", EmbedRequest, list[list[float]]),
        _post(f"{prefix}/embed_all", _embed_all, "A vector per token", EmbedAllRequest, list[list[list[float]]]),
        _post(f"{prefix}/predict", predict, "Labels and scores", PredictRequest, list[Prediction | list[Prediction]]),
        _post(f"{prefix}/rerank", rerank, "Texts by their score as answers to a query", RerankRequest, list[Rank]),
        _post(f"{prefix}/similarity", _similarity, "Cosine similarities", SimilarityRequest, list[float]),
        _post(f"{prefix}/tokenize", _tokenize, "The tokens of texts", TokenizeRequest, list[list[Token]]),
        _post(f"{prefix}/decode", _decode, "The texts of token ids", DecodeRequest, list[str]),
        Endpoint("GET", f"{prefix}/info", TEI, _info, "The model and the limits of the server", answer=Info),
    ]


ENDPOINTS = [
    *_endpoints(""),
    *_endpoints("/models/{name}"),
    _post("/", _root, "What the first model does by default", RootRequest, list),
    _post("/models/{name}", _root, "What a model does by default", RootRequest, list),
    Endpoint(
        "GET",
        "/health",
        TEI,
        health,
        "Whether requests are answered",
        answer=dict,
        statuses=(503,),
        open=True,
        quiet=True,
    ),
]
