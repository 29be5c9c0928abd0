"""What the text protocols share: texts or token ids in, vectors and scores out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from turbo_tvm.runtime.text import Text
from turbo_tvm.server import errors
from turbo_tvm.server.endpoint import Call
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.served_model import Patience, ServedModel, Tokens

_ROUNDING = 1e-6

Inputs = str | list[str | int | list[int]]  # what JSON may hold: a text, texts, token ids, lists of token ids


def patience(call: Call) -> Patience:
    """How long this server lets a request wait, from when its body had come."""
    return Patience(call.context.settings.timeout_s, since=call.begun)


async def requests_of(call: Call, model: ServedModel, inputs: Inputs, name: str) -> list[Tokens]:
    """What the engine is asked, for one text, several, token ids, or several lists of them. Raises Problem."""
    listed: list[Any] = [inputs] if isinstance(inputs, str) or _ids(inputs) else list(inputs)
    check_count(call, len(listed), name)
    if all(isinstance(one, str) for one in listed):
        need_tokenizer(model)
        return await model.tokenize(listed, patience(call))
    if all(isinstance(one, list) for one in listed):
        return [Tokens(one) for one in listed]
    raise Problem(errors.UNPROCESSABLE, f"{name} mixes texts and token ids: send one kind", param=name)


def _ids(inputs: Any) -> bool:
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(one, int) for one in inputs)


def check_count(call: Call, count: int, name: str) -> None:
    """Raises Problem for an empty list, and for one that is longer than this server takes."""
    if count == 0:
        raise Problem(errors.UNPROCESSABLE, f"{name} is empty", param=name)
    most = call.context.settings.max_inputs
    if count > most:
        raise Problem(errors.TOO_LARGE, f"{name} has {count} entries, this server takes {most}", param=name)


def need_tokenizer(model: ServedModel) -> None:
    """Raises Problem for a model that takes no texts."""
    if not model.has_tokenizer:
        raise Problem(errors.UNPROCESSABLE, f"the model {model.name} carries no tokenizer: send token ids")


def check_whole(model: ServedModel, requests: Sequence[Tokens]) -> None:
    """Raises Problem where a text was cut."""
    if not all(one.whole for one in requests):
        raise Problem(
            errors.TOO_LARGE,
            f"a text has more than the {model.max_length} tokens that the model {model.name} takes: shorten it, or "
            "allow it to be truncated",
        )


async def embed(call: Call, model: ServedModel, requests: Sequence[Tokens]) -> list[np.ndarray]:
    """A vector per request. Raises Problem for a model that gives none."""
    if model.embedding is None:
        raise Problem(errors.UNPROCESSABLE, _no_vectors(model))
    return await model.answer(requests, patience(call))


def _no_vectors(model: ServedModel) -> str:
    if model.scores is not None:
        return f"the model {model.name} is a classifier: it gives scores (/predict, /rerank), no embeddings"
    if model.token_rows is not None:
        return f"the model {model.name} gives a vector per token (/embed_all), none per text: compile it with a pooling"
    return f"the model {model.name} gives no embeddings"


async def scores(call: Call, model: ServedModel, texts: Sequence[Text], truncate: bool) -> list[np.ndarray]:
    """Raw scores, (labels,) per text or pair. Raises Problem for a model that gives none."""
    if model.scores is None:
        raise Problem(errors.UNPROCESSABLE, f"the model {model.name} is no classifier: it gives no scores")
    need_tokenizer(model)
    requests = await model.tokenize(texts, patience(call))
    if not truncate:
        check_whole(model, requests)
    return [np.atleast_1d(one) for one in await model.answer(requests, patience(call))]


def shortened(vectors: Sequence[np.ndarray], dimensions: int | None) -> list[np.ndarray]:
    """The first so many values of each, at unit length again (Matryoshka). Raises Problem."""
    if dimensions is None:
        return list(vectors)
    if not 1 <= dimensions <= len(vectors[0]):
        raise Problem(
            errors.UNPROCESSABLE, f"dimensions is from 1 to {len(vectors[0])}, not {dimensions}", param="dimensions"
        )
    return [unit(vector[:dimensions]) for vector in vectors]


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at unit length; one of zeros stays, and one that has it but for rounding is left as it is."""
    norm = float(np.linalg.norm(vector))
    return vector / np.float32(norm) if norm > 0 and abs(norm - 1) > _ROUNDING else vector


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the labels; of one label its sigmoid."""
    wide = logits.astype(np.float64)
    if len(wide) == 1:
        return 1 / (1 + np.exp(-wide))
    powers = np.exp(wide - wide.max())
    return powers / powers.sum()
