"""Classifiers and rerankers in text-embeddings-inference's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from turbo_tvm.runtime.long_texts import Side
from turbo_tvm.runtime.text import Text, TextOptions
from turbo_tvm.server import embeddings, errors
from turbo_tvm.server.endpoint import Call, Reply, json_reply
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.tei.types import PredictRequest, RerankRequest


async def predict(call: Call) -> Reply:
    """Answer a PredictRequest with labels and scores. Raises Problem."""
    body: PredictRequest = call.body
    return json_reply(await predictions(call, body, nested=False))


async def predictions(call: Call, body: PredictRequest, nested: bool) -> list:
    """Return labels and scores of each text or pair; of a single one alone, unless `nested`. Raises Problem."""
    texts, batch = _texts(call, body.inputs)
    model = call.named_model
    logits = await embeddings.scores(call, model, texts, bool(body.truncate), text_options(body))
    problem = model.model.manifest.problem_type
    scores = [one if body.raw_scores else embeddings.probabilities(one, problem) for one in logits]
    found = [_labelled(model.labels, one) for one in scores]
    return found if batch or nested else found[0]


def text_options(body: Any) -> TextOptions:
    """Return what a body asks of its texts: prompt_name, where it has one, and truncation_direction."""
    side = body.truncation_direction
    cut: Side | None = None if side is None else "left" if side.lower() == "left" else "right"
    return TextOptions(getattr(body, "prompt_name", None), cut)


def _texts(call: Call, inputs: str | list[str | list[str]]) -> tuple[list[Text], bool]:
    """Return the texts and pairs of a request, and whether it is a batch. Raises Problem."""
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
    """Return the labels with their scores, the highest first."""
    order = np.argsort(-values, kind="stable")
    return [{"label": labels[i], "score": float(values[i])} for i in order]


async def rerank(call: Call) -> Reply:
    """Answer a RerankRequest with its texts by score, the highest first. Raises Problem."""
    body: RerankRequest = call.body
    embeddings.check_count(call, len(body.texts), "texts")
    pairs: list[Text] = [(body.query, text) for text in body.texts]
    logits = await embeddings.scores(call, call.named_model, pairs, bool(body.truncate), text_options(body))
    if len(logits[0]) != 1:
        raise Problem(errors.UNPROCESSABLE, f"a reranker gives one score, this model {len(logits[0])}: use /predict")
    values = np.array([(one if body.raw_scores else embeddings.probabilities(one))[0] for one in logits])
    ranks = []
    for i in np.argsort(-values, kind="stable").tolist():
        rank: dict[str, Any] = {"index": i, "score": float(values[i])}
        ranks.append({**rank, "text": body.texts[i]} if body.return_text else rank)
    return json_reply(ranks)
