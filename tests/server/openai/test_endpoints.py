"""OpenAI's client gets the numbers that `CompiledModel.run` gives, bit by bit."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from openai import OpenAI
from running_server import exact

pytestmark = pytest.mark.xdist_group("server")

TEXTS = ["the cat sat on a mat", "a dog ran", "fast", "red blue red blue the the slow park"]  # as the fixture `wanted`


@pytest.fixture
def openai(real):
    with OpenAI(base_url=f"{real.url}/v1", api_key="any", max_retries=0) as client:
        yield client


class TestOpenAI:
    @pytest.mark.parametrize("form", ["float", "base64"])
    def test_embeddings(self, openai, wanted, local, form):
        found = openai.embeddings.create(model="embedder", input=TEXTS, encoding_format=form)
        vectors = [one.embedding for one in found.data]
        if form == "base64":
            vectors = [np.frombuffer(base64.b64decode(one), "<f4") for one in vectors]
        exact(vectors, wanted)
        tokens = sum(map(len, local.tokenize(TEXTS)[0]))
        assert (found.usage.prompt_tokens, found.usage.total_tokens, found.model) == (tokens, tokens, "embedder")

    def test_one_text_and_token_ids(self, openai, wanted, local):
        exact(openai.embeddings.create(model="embedder", input=TEXTS[1]).data[0].embedding, wanted[1])
        sequences = [ids.tolist() for ids in local.tokenize(TEXTS)[0]]
        exact(openai.embeddings.create(model="embedder", input=sequences[2]).data[0].embedding, wanted[2])
        found = openai.embeddings.create(model="embedder", input=sequences)
        exact([one.embedding for one in found.data], wanted)

    def test_dimensions(self, openai, wanted):
        found = openai.embeddings.create(model="embedder", input=TEXTS, dimensions=5)
        short = wanted[:, :5]
        np.testing.assert_allclose(
            [one.embedding for one in found.data], short / np.linalg.norm(short, axis=1, keepdims=True), rtol=1e-6
        )

    def test_models(self, openai):
        assert [model.id for model in openai.models.list()] == ["embedder", "classifier", "reranker"]
        assert openai.models.retrieve("reranker").owned_by == "turbo_tvm"

    def test_errors_are_openai_s(self, openai):
        import openai as package

        with pytest.raises(package.NotFoundError, match="no model 'gpt'") as caught:
            openai.embeddings.create(model="gpt", input="a")
        assert caught.value.body["param"] == "model"
        with pytest.raises(package.APIStatusError, match="48 tokens") as caught:
            openai.embeddings.create(model="embedder", input="red " * 60)
        assert caught.value.status_code == 413
        with pytest.raises(package.UnprocessableEntityError, match="classifier"):
            openai.embeddings.create(model="classifier", input="a")
