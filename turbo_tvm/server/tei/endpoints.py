"""text-embeddings-inference's endpoints. The model is the server's first, or under /models/NAME/... the one named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from turbo_tvm import __version__
from turbo_tvm.runtime.text import Text
from turbo_tvm.server import embeddings, errors
from turbo_tvm.server.embeddings import Inputs
from turbo_tvm.server.endpoint import Call, Endpoint, Protocol, Reply, decoded, json_reply
from turbo_tvm.server.errors import Problem, tei_form
from turbo_tvm.server.kserve.http import is_ready
from turbo_tvm.server.served_model import ServedModel

TEI = Protocol("tei", tei_form)
_MOST_TOKENIZED = 1 << 20  # characters whose tokens are listed

Dimensions = Annotated[int, msgspec.Meta(ge=1)]
Direction = Literal["right", "Right"]  # at which end what is too long is cut: there is no other yet
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class EmbedRequest(msgspec.Struct):
    """inputs: a text, texts, token ids or lists of them. normalize: to unit length. truncate: what is too long."""

    inputs: Inputs
    normalize: bool = True
    truncate: bool | None = False
    truncation_direction: Direction = "right"
    prompt_name: None = None
    dimensions: Dimensions | None = None


class EmbedAllRequest(msgspec.Struct):
    """The same, for a vector per token."""

    inputs: Inputs
    truncate: bool | None = False
    truncation_direction: Direction = "right"
    prompt_name: None = None


class PredictRequest(msgspec.Struct):
    """inputs: a text; a list of one text or of a pair; or a list of such lists."""

    inputs: str | list[str | list[str]]
    raw_scores: bool = False
    truncate: bool | None = False
    truncation_direction: Direction = "right"


class RerankRequest(msgspec.Struct):
    """Scores of texts as answers to a query."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = False
    truncation_direction: Direction = "right"


class SimilarityInputs(msgspec.Struct):
    """One text, and those it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityRequest(msgspec.Struct):
    """Cosine similarity of one text to others."""

    inputs: SimilarityInputs


class TokenizeRequest(msgspec.Struct):
    """inputs: a text or texts."""

    inputs: str | list[str]
    add_special_tokens: bool = True


class DecodeRequest(msgspec.Struct):
    """ids: of one sequence, or of several."""

    ids: list[TokenId | list[TokenId]]
    skip_special_tokens: bool = True


class RootRequest(msgspec.Struct):
    """What InferenceClient sends: `inputs` for whatever the model does; parameters beside it or in `parameters`."""

    inputs: Any
    parameters: dict[str, Any] = {}


class Prediction(msgspec.Struct):
    """A label and its score."""

    label: str
    score: float


class Rank(msgspec.Struct):
    """index: of the text in the request."""

    index: int
    score: float
    text: str | None = None


class Token(msgspec.Struct):
    """start, stop: its characters in the text; None for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Info(msgspec.Struct):
    """What is served."""

    model_id: str
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int | None
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str


def _model(call: Call) -> ServedModel:
    return call.context.repository.get(call.path.get("name"))


async def _embed(call: Call) -> Reply:
    body: EmbedRequest = call.body
    model = _model(call)
    requests = await embeddings.requests_of(call, model, body.inputs, "inputs")
    if not body.truncate:
        embeddings.check_whole(model, requests)
    vectors = embeddings.shortened(await embeddings.embed(call, model, requests), body.dimensions)
    return json_reply([embeddings.unit(vector) if body.normalize else vector for vector in vectors])


async def _embed_all(call: Call) -> Reply:
    body: EmbedAllRequest = call.body
    model = _model(call)
    spec = model.token_rows
    if spec is None:
        raise Problem(errors.UNPROCESSABLE, f"the model {model.name} gives no vector per token")
    requests = await embeddings.requests_of(call, model, body.inputs, "inputs")
    if not body.truncate:
        embeddings.check_whole(model, requests)
    return json_reply(await model.answer(requests, embeddings.patience(call), spec.name))


async def _predict(call: Call) -> Reply:
    body: PredictRequest = call.body
    return json_reply(await _predictions(call, body, nested=False))


async def _predictions(call: Call, body: PredictRequest, nested: bool) -> list:
    texts, batch = _texts(call, body.inputs)
    model = _model(call)
    logits = await embeddings.scores(call, model, texts, bool(body.truncate))
    found = [_labelled(model.labels, one if body.raw_scores else embeddings.probabilities(one)) for one in logits]
    return found if batch or nested else found[0]


def _texts(call: Call, inputs: str | list[str | list[str]]) -> tuple[list[Text], bool]:
    """Texts and pairs, and whether they are a batch."""
    if isinstance(inputs, str):
        return [inputs], False
    embeddings.check_count(call, len(inputs), "inputs")
    if all(isinstance(one, str) for one in inputs):
        return [_text(inputs)], False
    if any(isinstance(one, str) for one in inputs):
        raise Problem(errors.UNPROCESSABLE, "inputs mixes texts and lists: a batch is a list of lists")
    return [_text(one) for one in inputs], True


def _text(parts: Sequence[Any]) -> Text:
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0], parts[1]
    raise Problem(errors.UNPROCESSABLE, f"a request is one text or a pair of two, not {len(parts)}")


def _labelled(labels: Sequence[str], values: np.ndarray) -> list[dict[str, Any]]:
    """By score, the highest first."""
    order = np.argsort(-values, kind="stable")
    return [{"label": labels[i], "score": float(values[i])} for i in order]


async def _rerank(call: Call) -> Reply:
    body: RerankRequest = call.body
    embeddings.check_count(call, len(body.texts), "texts")
    pairs: list[Text] = [(body.query, text) for text in body.texts]
    logits = await embeddings.scores(call, _model(call), pairs, bool(body.truncate))
    if len(logits[0]) != 1:
        raise Problem(errors.UNPROCESSABLE, f"a reranker gives one score, this model {len(logits[0])}: use /predict")
    values = np.array([(one if body.raw_scores else embeddings.probabilities(one))[0] for one in logits])
    ranks = []
    for i in np.argsort(-values, kind="stable").tolist():
        rank: dict[str, Any] = {"index": i, "score": float(values[i])}
        ranks.append({**rank, "text": body.texts[i]} if body.return_text else rank)
    return json_reply(ranks)


async def _similarity(call: Call) -> Reply:
    body: SimilarityRequest = call.body
    return json_reply(await _similarities(call, body.inputs))


async def _similarities(call: Call, inputs: SimilarityInputs) -> list[float]:
    embeddings.check_count(call, len(inputs.sentences), "sentences")
    model = _model(call)
    embeddings.need_tokenizer(model)
    requests = await model.tokenize([inputs.source_sentence, *inputs.sentences], embeddings.patience(call))
    embeddings.check_whole(model, requests)
    first, *others = map(embeddings.unit, await embeddings.embed(call, model, requests))
    return [float(first @ other) for other in others]


async def _tokenize(call: Call) -> Reply:
    body: TokenizeRequest = call.body
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    embeddings.check_count(call, len(texts), "inputs")
    model = _model(call)
    embeddings.need_tokenizer(model)
    if sum(map(len, texts)) > _MOST_TOKENIZED:
        raise Problem(errors.TOO_LARGE, f"inputs have more than {_MOST_TOKENIZED:,} characters: send fewer")
    patience = embeddings.patience(call)
    return json_reply(await model.encodings(texts, body.add_special_tokens, _spelt, patience))


def _spelt(encoding: Any) -> list[dict[str, Any]]:
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
    model = _model(call)
    embeddings.need_tokenizer(model)
    single = bool(body.ids) and all(isinstance(one, int) for one in body.ids)
    if not single and any(isinstance(one, int) for one in body.ids):
        raise Problem(errors.UNPROCESSABLE, "ids mixes numbers and lists: send one sequence, or a list of them")
    listed: list[Any] = [body.ids] if single else body.ids
    embeddings.check_count(call, len(listed), "ids")
    return json_reply(await model.decode(listed, body.skip_special_tokens, embeddings.patience(call)))


async def _info(call: Call) -> Reply:
    model, settings = _model(call), call.context.settings
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


def _kind(model: ServedModel) -> dict[str, Any]:
    if model.scores is None:
        return {"embedding": {}}
    labels = model.labels
    named = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    return {"reranker" if len(labels) == 1 else "classifier": named}


async def health(call: Call) -> Reply:
    """Empty where requests are answered. Raises Problem."""
    if not is_ready(call):
        raise Problem(errors.UNAVAILABLE, "the server is about to stop, or has no model")
    return json_reply({})


async def _root(call: Call) -> Reply:
    """Whatever the model does, as the Inference API spells it."""
    inputs, model = call.body.inputs, _model(call)
    if isinstance(inputs, dict):
        body = _converted({"inputs": inputs}, SimilarityRequest)
        return json_reply(await _similarities(call, body.inputs))
    flat = {**decoded(_ANY, call.raw), **call.body.parameters}
    if model.scores is not None:
        return json_reply(await _predictions(call, _converted(flat, PredictRequest), nested=True))
    call.body = _converted(flat, EmbedRequest)
    return await _embed(call)


_ANY = msgspec.json.Decoder(dict)


def _converted(plain: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise Problem(errors.UNPROCESSABLE, str(error)) from None


_OWN = (424,)


def _endpoints(prefix: str) -> list[Endpoint]:
    def post(path: str, handle: Any, summary: str, body: Any, answer: Any) -> Endpoint:
        return Endpoint("POST", prefix + path, TEI, handle, summary, body=body, answer=answer, statuses=_OWN)

    return [
        post("/embed", _embed, "A vector per text", EmbedRequest, list[list[float]]),
        post("/embed_all", _embed_all, "A vector per token", EmbedAllRequest, list[list[list[float]]]),
        post("/predict", _predict, "Labels and scores", PredictRequest, list[Prediction | list[Prediction]]),
        post("/rerank", _rerank, "Texts by their score as answers to a query", RerankRequest, list[Rank]),
        post("/similarity", _similarity, "Cosine similarities", SimilarityRequest, list[float]),
        post("/tokenize", _tokenize, "The tokens of texts", TokenizeRequest, list[list[Token]]),
        post("/decode", _decode, "The texts of token ids", DecodeRequest, list[str]),
        Endpoint("GET", f"{prefix}/info", TEI, _info, "What is served", answer=Info),
    ]


ENDPOINTS = [
    *_endpoints(""),
    *_endpoints("/models/{name}"),
    Endpoint("POST", "/", TEI, _root, "Whatever the first model does", body=RootRequest, answer=list, statuses=_OWN),
    Endpoint(
        "POST", "/models/{name}", TEI, _root, "Whatever a model does", body=RootRequest, answer=list, statuses=_OWN
    ),
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
