"""Hugging Face's InferenceClient and plain requests get the numbers that `CompiledModel.run` gives, bit by bit."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from running_server import exact
from tiny_text_models import VOCABULARY

import turbo_tvm
from turbo_tvm.runtime.text import TextOptions

pytestmark = pytest.mark.xdist_group("server")

TEXTS = ["the cat sat on a mat", "a dog ran", "fast", "red blue red blue the the slow park"]  # as the fixture `wanted`


class TestInferenceClient:
    def test_feature_extraction(self, real, wanted):
        client = InferenceClient(real.url)
        exact(client.feature_extraction(TEXTS), wanted)
        exact(client.feature_extraction(TEXTS[0], normalize=True, truncate=True), wanted[:1])

    def test_sentence_similarity(self, real, wanted):
        found = InferenceClient(real.url).sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
        np.testing.assert_allclose(found, wanted[1:] @ wanted[0], rtol=1e-5)

    def test_text_classification(self, real, artifacts):
        found = InferenceClient(f"{real.url}/models/classifier").text_classification(TEXTS[0])
        logits = turbo_tvm.load(artifacts["classifier"], threads=1).encode(TEXTS[:1])[0].astype(np.float64)
        powers = np.exp(logits) / np.exp(logits).sum()
        assert [one.label for one in found] == [("cats", "dogs", "neither")[i] for i in np.argsort(-powers)]
        np.testing.assert_allclose([one.score for one in found], np.sort(powers)[::-1], rtol=1e-6)


@pytest.fixture
def client(real):
    with httpx.Client(base_url=real.url) as made:
        yield made


class TestTextEmbeddingsInference:
    def test_embed(self, client, wanted, local):
        exact(client.post("/embed", json={"inputs": TEXTS}).json(), wanted)
        exact(client.post("/models/embedder/embed", json={"inputs": TEXTS[0]}).json(), wanted[:1])
        sequences = [ids.tolist() for ids in local.tokenize(TEXTS)[0]]
        exact(client.post("/embed", json={"inputs": sequences}).json(), wanted)
        exact(client.post("/embed", json={"inputs": TEXTS, "normalize": False}).json(), wanted)

    def test_what_is_too_long_is_cut_only_if_it_may_be(self, client, local):
        long = "red " * 60
        refused = client.post("/embed", json={"inputs": long})
        assert refused.status_code == 413 and refused.json()["error_type"] == "Validation"
        exact(client.post("/embed", json={"inputs": long, "truncate": True}).json(), local.encode([long]))
        longer = "red " * 100_000
        assert client.post("/embed", json={"inputs": longer}).status_code == 413
        exact(client.post("/embed", json={"inputs": longer, "truncate": True}).json(), local.encode([long]))
        assert client.post("/tokenize", json={"inputs": "red " * 300_000}).status_code == 413
        similar = {"inputs": {"source_sentence": "red", "sentences": [long]}}
        assert client.post("/similarity", json=similar).status_code == 413
        found = client.post(
            "/similarity", json=similar | {"parameters": {"truncate": True, "prompt_name": None}}
        ).json()
        first, second = local.encode(["red", long])
        exact(found, [float(first @ second)])

    def test_what_would_change_the_answer_is_refused(self, client):
        assert client.post("/embed", json={"inputs": "a", "truncation_direction": "middle"}).status_code == 422
        unknown = client.post("/embed", json={"inputs": "a", "prompt_name": "passage"})
        assert unknown.status_code == 400 and "no prompt 'passage'; it has fast, slow" in unknown.text
        assert client.post("/embed", json={"inputs": "a", "truncation_direction": "right"}).status_code == 200

    @pytest.mark.parametrize("body", [b"[1, 2", b'{"inputs": 5, "more": nul}', b'{"inputs": null} and more'])
    def test_another_form_and_no_json_after_it(self, client, body):
        assert client.post("/embed", content=body).status_code in (400, 422)

    def test_either_end_is_cut(self, client, local):
        text = "red " * 60 + "the cat"
        body = {"inputs": text, "truncate": True}
        for side in ("left", "Left", "right", "Right"):
            ids, _ = local.tokenize([text], TextOptions(cut=side.lower()))
            exact(client.post("/embed", json=body | {"truncation_direction": side}).json(), local.run(ids))
        assert local.tokenize([text], TextOptions(cut="left"))[0][0][-2] == VOCABULARY.index("cat")

    def test_texts_of_many_characters_and_few_tokens(self, client, local):
        for text in (" " * 1_000_000 + "red cat", "red" + "\n" * 1_000_000 + "cat", "red " + "a" * 20_000 + " cat"):
            for truncate in (False, True):
                exact(client.post("/embed", json={"inputs": text, "truncate": truncate}).json(), local.encode([text]))

    @pytest.mark.parametrize("path", ["/embed", "/similarity", "/tokenize", "/v1/embeddings"])
    def test_fields_that_are_null_are_not_there(self, client, path):
        plain = {
            "/similarity": {"inputs": {"source_sentence": "red", "sentences": ["cat"]}},
            "/v1/embeddings": {"model": "embedder", "input": "red"},
        }.get(path, {"inputs": "red"})
        optional = (
            "normalize",
            "truncate",
            "truncation_direction",
            "prompt_name",
            "dimensions",
            "encoding_format",
            "user",
        )
        nulls = dict.fromkeys((*optional, "add_special_tokens", "parameters"))
        answer = client.post(path, json=plain | nulls)
        assert answer.status_code == 200 and answer.json() == client.post(path, json=plain).json()
        needed = next(iter(set(plain) - {"model"}))
        assert client.post(path, json=plain | {needed: None}).status_code == 422

    @pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
    def test_prompts_are_those_of_the_model(self, client, local, path):
        field = "input" if path.startswith("/v1") else "inputs"
        body = {field: "cat", **({"model": "embedder"} if field == "input" else {})}
        plain = client.post(path, json=body).json()
        vector = plain["data"][0]["embedding"] if field == "input" else plain[0]
        exact([vector], local.run([local.tokenizer.encodings(["the fast cat"])[0].ids]))  # its default prompt
        if field == "inputs":
            named = client.post(path, json=body | {"prompt_name": "slow"}).json()
            exact(named, local.encode(["cat"], prompt_name="slow"))
            exact(named, local.run([local.tokenizer.encodings(["the slow cat"])[0].ids]))

    def test_a_long_sequence_is_decoded(self, client):
        assert client.post("/decode", json={"ids": [5] * 3000}).status_code == 200
        assert client.post("/decode", json={"ids": []}).status_code == 422
        assert client.post("/decode", json={"ids": [[5]] * 3000}).status_code == 413

    def test_rerank(self, client, artifacts):
        scores = np.array(turbo_tvm.load(artifacts["reranker"], threads=1).encode([("red cat", t) for t in TEXTS]))
        flat = scores.reshape(-1)
        body = {"query": "red cat", "texts": TEXTS, "raw_scores": True, "return_text": True}
        found = client.post("/models/reranker/rerank", json=body).json()
        assert [one["index"] for one in found] == np.argsort(-flat, kind="stable").tolist()
        exact([one["score"] for one in found], np.sort(flat)[::-1])
        assert [one["text"] for one in found] == [TEXTS[one["index"]] for one in found]
        found = client.post("/models/reranker/rerank", json={"query": "red cat", "texts": TEXTS}).json()
        np.testing.assert_allclose([one["score"] for one in found], 1 / (1 + np.exp(-np.sort(flat)[::-1])), rtol=1e-6)
        assert "text" not in found[0]

    @pytest.mark.parametrize(
        ("inputs", "batch"), [("a", False), (["a"], False), (["a", "b"], False), ([["a"], ["b", "c"]], True)]
    )
    def test_predict(self, client, artifacts, inputs, batch):
        found = client.post("/models/classifier/predict", json={"inputs": inputs, "raw_scores": True}).json()
        asked = inputs if batch else [[inputs] if isinstance(inputs, str) else inputs]
        local = turbo_tvm.load(artifacts["classifier"], threads=1)
        logits = local.encode([one[0] if len(one) == 1 else tuple(one) for one in asked])
        for mine, right in zip(found if batch else [found], logits, strict=True):
            exact([one["score"] for one in sorted(mine, key=lambda one: one["label"])], right)

    def test_similarity(self, client, wanted):
        body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS}}
        np.testing.assert_allclose(client.post("/similarity", json=body).json(), wanted @ wanted[0], rtol=1e-5)

    def test_tokens_there_and_back(self, client):
        found = client.post("/tokenize", json={"inputs": "the cat sat"}).json()[0]
        assert [one["text"] for one in found] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
        assert [(one["start"], one["stop"]) for one in found] == [(None, None), (0, 3), (4, 7), (8, 11), (None, None)]
        plain = client.post("/tokenize", json={"inputs": ["cat"], "add_special_tokens": False}).json()[0]
        assert [one["special"] for one in plain] == [False]
        ids = [one["id"] for one in found]
        assert client.post("/decode", json={"ids": ids}).json() == ["the cat sat"]
        kept = client.post("/decode", json={"ids": [ids, ids], "skip_special_tokens": False}).json()
        assert kept == ["[CLS] the cat sat [SEP]"] * 2

    def test_info_and_health(self, client):
        info = client.get("/info").json()
        assert (info["model_id"], info["model_type"], info["max_input_length"]) == ("embedder", {"embedding": {}}, 48)
        reranker = client.get("/models/reranker/info").json()["model_type"]
        assert reranker == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
        classifier = client.get("/models/classifier/info").json()["model_type"]["classifier"]
        assert classifier["id2label"] == {"0": "cats", "1": "dogs", "2": "neither"}
        assert classifier["label2id"] == {"cats": 0, "dogs": 1, "neither": 2}
        assert client.get("/health").status_code == 200

    def test_models_say_what_they_are_not(self, client):
        for path, body, words in (
            ("/predict", {"inputs": "a"}, "no classifier"),
            ("/rerank", {"query": "a", "texts": ["b"]}, "no classifier"),
            ("/models/classifier/rerank", {"query": "a", "texts": ["b"]}, "one score"),
            ("/models/reranker/embed", {"inputs": "a"}, "classifier"),
            ("/embed_all", {"inputs": "a"}, "no vector per token"),
        ):
            reply = client.post(path, json=body)
            assert reply.status_code == 422 and words in reply.json()["error"], path
