"""JSON bodies of text-embeddings-inference: what requests are decoded as, and what the document shows of answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from turbo_tvm.server.embeddings import Inputs

Dimensions = Annotated[int, msgspec.Meta(ge=1)]
Direction = Literal["right", "Right", "left", "Left"]  # the end at which a text that is too long is cut
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class EmbedRequest(msgspec.Struct):
    """Asks for a vector per text."""

    inputs: Inputs
    normalize: bool = True  # to unit length
    truncate: bool | None = False  # cut texts that are too long, which are refused otherwise
    truncation_direction: Direction | None = None  # the model's
    prompt_name: str | None = None  # of the model's prompts; its default otherwise
    dimensions: Dimensions | None = None


class EmbedAllRequest(msgspec.Struct):
    """Asks for a vector per token."""

    inputs: Inputs
    truncate: bool | None = False
    truncation_direction: Direction | None = None  # the model's
    prompt_name: str | None = None


class PredictRequest(msgspec.Struct):
    """Asks for labels and scores."""

    inputs: str | list[str | list[str]]  # a text; a list of one text or of a pair; or a list of such lists
    raw_scores: bool = False
    truncate: bool | None = False
    truncation_direction: Direction | None = None  # the model's


class RerankRequest(msgspec.Struct):
    """Asks for scores of texts as answers to a query."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = False
    truncation_direction: Direction | None = None  # the model's


class SimilarityInputs(msgspec.Struct):
    """A text, and those it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(msgspec.Struct, frozen=True):
    """How the texts are read."""

    truncate: bool | None = False
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(msgspec.Struct):
    """Asks for the cosine similarities of a text to others."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters = SimilarityParameters()


class TokenizeRequest(msgspec.Struct):
    """Asks for the tokens of texts."""

    inputs: str | list[str]
    add_special_tokens: bool = True


class DecodeRequest(msgspec.Struct):
    """Asks for the texts of token ids."""

    ids: list[TokenId | list[TokenId]]  # of one sequence, or of several
    skip_special_tokens: bool = True


class RootRequest(msgspec.Struct):
    """Asks for what the model does by default, as Hugging Face's InferenceClient sends it."""

    inputs: Any
    parameters: dict[str, Any] = {}  # these may also stand beside `inputs`


class Prediction(msgspec.Struct):
    """A label and its score."""

    label: str
    score: float


class Rank(msgspec.Struct):
    """The score of a text as an answer to the query."""

    index: int  # of the text in the request
    score: float
    text: str | None = None


class Token(msgspec.Struct):
    """A token of a text."""

    id: int
    text: str
    special: bool
    start: int | None  # of its characters in the text; None for special tokens
    stop: int | None


class Info(msgspec.Struct):
    """The model that is served, and the limits of the server."""

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
