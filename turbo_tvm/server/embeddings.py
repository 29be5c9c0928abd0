"""Operations that the text protocols share: from texts or token ids to vectors and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from turbo_tvm.artifact.manifest import ProblemType
from turbo_tvm.runtime.text import AS_THE_MODEL, Text, TextOptions
from turbo_tvm.server import errors
from turbo_tvm.server.deadline import Deadline
from turbo_tvm.server.endpoint import Call
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.model_service import ModelService
from turbo_tvm.server.tokenization import EngineRequest

_ROUNDING = 1e-6

Inputs = str | list[str | int | list[int]]  # a text, texts, token ids, or lists of token ids, in JSON


def deadline_of(call: Call) -> Deadline:
    """Return the deadline of a request, by the server's time-out, from when its body had come."""
    return Deadline(call.context.settings.timeout_s, started_s=call.received_s)


async def requests_of(
    call: Call, model: ModelService, inputs: Inputs, name: str, options: TextOptions = AS_THE_MODEL
) -> list[EngineRequest]:
    """Return the engine's requests for one text, several, token ids, or several lists of them. Raises Problem.

    name: of the field, for messages.
    """
    listed: list[Any] = [inputs] if isinstance(inputs, str) or _ids(inputs) else list(inputs)
    check_count(call, len(listed), name)
    if all(isinstance(one, str) for one in listed):
        need_tokenizer(model)
        return await model.tokenization.tokenize(listed, deadline_of(call), options)
    if all(isinstance(one, list) for one in listed):
        return [EngineRequest(one) for one in listed]
    raise Problem(errors.UNPROCESSABLE, f"{name} mixes texts and token ids: send one kind", param=name)


def _ids(inputs: Any) -> bool:
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(one, int) for one in inputs)


def check_count(call: Call, count: int, name: str) -> None:
    """Raise Problem for an empty list, and for one that is longer than this server takes."""
    if count == 0:
        raise Problem(errors.UNPROCESSABLE, f"{name} is empty", param=name)
    most = call.context.settings.max_inputs
    if count > most:
        raise Problem(errors.TOO_LARGE, f"{name} has {count} entries, this server takes {most}", param=name)


def need_tokenizer(model: ModelService) -> None:
    """Raise Problem for a model that takes no texts."""
    if not model.has_tokenizer:
        raise Problem(errors.UNPROCESSABLE, f"the model {model.name} carries no tokenizer: send token ids")


def check_whole(model: ModelService, requests: Sequence[EngineRequest]) -> None:
    """Raise Problem where a text was cut."""
    if not all(one.whole for one in requests):
        raise Problem(
            errors.TOO_LARGE,
            f"a text has more than the {model.max_length} tokens that the model {model.name} takes: shorten it, or "
            "allow it to be truncated",
        )


async def embed(call: Call, model: ModelService, requests: Sequence[EngineRequest]) -> list[np.ndarray]:
    """Return a vector per request, float32 (columns,). Raises Problem for a model that gives none."""
    if model.embedding is None:
        raise Problem(errors.UNPROCESSABLE, _no_vectors(model))
    return await model.answer(requests, deadline_of(call))


def _no_vectors(model: ModelService) -> str:
    if model.scores is not None:
        return f"the model {model.name} is a classifier: it gives scores (/predict, /rerank), no embeddings"
    if model.token_rows is not None:
        return f"the model {model.name} gives a vector per token (/embed_all), none per text: compile it with a pooling"
    return f"the model {model.name} gives no embeddings"


async def scores(
    call: Call, model: ModelService, texts: Sequence[Text], truncate: bool, options: TextOptions = AS_THE_MODEL
) -> list[np.ndarray]:
    """Return raw scores, float32 (labels,) per text or pair. Raises Problem for a model that gives none."""
    if model.scores is None:
        raise Problem(errors.UNPROCESSABLE, f"the model {model.name} is no classifier: it gives no scores")
    need_tokenizer(model)
    requests = await model.tokenization.tokenize(texts, deadline_of(call), options)
    if not truncate:
        check_whole(model, requests)
    return [np.atleast_1d(one) for one in await model.answer(requests, deadline_of(call))]


def shortened(vectors: Sequence[np.ndarray], dimensions: int | None) -> list[np.ndarray]:
    """Return the first `dimensions` values of each vector, scaled to unit length (Matryoshka). Raises Problem."""
    if dimensions is None:
        return list(vectors)
    if not 1 <= dimensions <= len(vectors[0]):
        raise Problem(
            errors.UNPROCESSABLE, f"dimensions is from 1 to {len(vectors[0])}, not {dimensions}", param="dimensions"
        )
    return [unit(vector[:dimensions]) for vector in vectors]


def unit(vector: np.ndarray) -> np.ndarray:
    """Return the vector scaled to unit length; one of zeros, or already of that length, is returned as it is."""
    norm = float(np.linalg.norm(vector))
    return vector / np.float32(norm) if norm > 0 and abs(norm - 1) > _ROUNDING else vector


def probabilities(logits: np.ndarray, problem_type: ProblemType | None = None) -> np.ndarray:
    """Return the softmax over the labels, float64; of a single one, and of several that may hold at once, the sigmoid.

    What a regression gives is no probability: it is returned as it is. These are the rules of transformers' pipeline.
    """
    wide = logits.astype(np.float64)
    if problem_type == "regression":
        return wide
    if len(wide) == 1 or problem_type == "multi_label_classification":
        return 1 / (1 + np.exp(-wide))
    powers = np.exp(wide - wide.max())
    return powers / powers.sum()
