"""Public clients of every protocol get the numbers that `CompiledModel.run` gives, bit by bit."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from huggingface_hub import InferenceClient
from openai import OpenAI
from running_server import exact

import turbo_tvm

pytestmark = pytest.mark.xdist_group("server")

TEXTS = ["the cat sat on a mat", "a dog ran", "fast", "red blue red blue the the slow park"]


@pytest.fixture(scope="module")
def local(artifacts):
    """The embedder without a server."""
    return turbo_tvm.load(artifacts["embedder"], threads=1)


@pytest.fixture(scope="module")
def wanted(local):
    return np.stack(local.encode(TEXTS))


@pytest.fixture(params=["http", "grpc"])
def triton(request, real):
    """tritonclient's module, and a client of it."""
    module, place = {
        "http": (triton_http, real.url.removeprefix("http://")),
        "grpc": (triton_grpc, real.grpc),
    }[request.param]
    client = module.InferenceServerClient(place)
    yield module, client
    client.close()


def tensor(module, name, array, datatype):
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def _plain(module):
    return {"as_json": True} if module is triton_grpc else {}


class TestTriton:
    def test_health_and_metadata(self, triton):
        module, client = triton
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("embedder")
        assert not client.is_model_ready("nobody")
        assert client.get_server_metadata(**_plain(module))["name"] == "turbo_tvm"
        found = client.get_model_metadata("embedder", **_plain(module))
        inputs = {one["name"]: one["datatype"] for one in found["inputs"]}
        assert inputs == {"text": "BYTES", "input_ids": "INT64", "attention_mask": "INT64", "token_type_ids": "INT64"}
        assert [one["name"] for one in found["outputs"]] == ["embedding", "sentence_embedding"]

    def test_texts(self, triton, wanted):
        module, client = triton
        array = np.array([text.encode() for text in TEXTS], object)
        exact(client.infer("embedder", [tensor(module, "text", array, "BYTES")]).as_numpy("embedding"), wanted)
        square = tensor(module, "text", array.reshape(-1, 1), "BYTES")
        asked = [module.InferRequestedOutput("sentence_embedding"), module.InferRequestedOutput("embedding")]
        answer = client.infer("embedder", [square], outputs=asked, request_id="7")
        exact(answer.as_numpy("sentence_embedding"), wanted)
        exact(answer.as_numpy("embedding"), wanted)
        response = answer.get_response()
        assert (response["id"] if isinstance(response, dict) else response.id) == "7"

    @pytest.mark.parametrize("dtype", [np.int64, np.int32])
    def test_padded_token_ids(self, triton, local, wanted, dtype):
        module, client = triton
        sequences, _ = local.tokenize(TEXTS)
        ids, mask = (np.zeros((len(TEXTS), max(map(len, sequences)) + 2), dtype) for _ in range(2))
        for row, (sequence, ids_row) in enumerate(zip(sequences, ids, strict=True)):
            ids_row[: len(sequence)], mask[row, : len(sequence)] = sequence, 1
        name = "INT64" if dtype is np.int64 else "INT32"
        inputs = [tensor(module, "input_ids", ids, name), tensor(module, "attention_mask", mask, name)]
        inputs.append(tensor(module, "token_type_ids", np.zeros_like(ids), name))
        exact(client.infer("embedder", inputs).as_numpy("embedding"), wanted)

    def test_scores_of_a_classifier(self, triton, artifacts):
        module, client = triton
        array = np.array([text.encode() for text in TEXTS], object)
        found = client.infer("classifier", [tensor(module, "text", array, "BYTES")]).as_numpy("logits")
        exact(found, np.stack(turbo_tvm.load(artifacts["classifier"], threads=1).encode(TEXTS)))

    def test_pairs_of_texts(self, triton, artifacts):
        module, client = triton
        names = [one["name"] for one in client.get_model_metadata("reranker", **_plain(module))["inputs"]]
        assert names[:2] == ["text", "text_pair"]
        query, others = np.array([b"red cat"] * len(TEXTS), object), np.array([text.encode() for text in TEXTS], object)
        first, second = tensor(module, "text", query, "BYTES"), tensor(module, "text_pair", others, "BYTES")
        found = client.infer("reranker", [first, second]).as_numpy("logits")
        local = turbo_tvm.load(artifacts["reranker"], threads=1)
        exact(found, np.stack(local.encode([("red cat", text) for text in TEXTS])))
        with pytest.raises(Exception, match="text_pair holds 1 texts, text 4"):
            client.infer("reranker", [first, tensor(module, "text_pair", others[:1], "BYTES")])
        with pytest.raises(Exception, match="text_pair is of BYTES"):
            client.infer("reranker", [first, tensor(module, "text_pair", np.ones(4, np.int64), "INT64")])

    def test_errors_name_what_is_wrong(self, triton):
        module, client = triton
        array = np.array([b"a"], object)
        text = tensor(module, "text", array, "BYTES")
        for arguments, words in (
            (("nobody", [text]), "no model 'nobody'"),
            (("embedder", [tensor(module, "txt", array, "BYTES")]), "it takes text, input_ids"),
            (("embedder", [tensor(module, "input_ids", np.full((1, 3), 999, np.int64), "INT64")]), "999"),
            (("embedder", [tensor(module, "input_ids", np.ones((1, 49), np.int64), "INT64")]), "49"),
            (("embedder", [tensor(module, "text", np.array([b"\xff"], object), "BYTES")]), "UTF-8"),
        ):
            with pytest.raises(Exception, match=words) as caught:
                client.infer(*arguments)
            assert "InferenceServerException" in type(caught.value).__name__

    def test_texts_are_cut_only_if_they_may_be(self, triton, local):
        module, client = triton
        long = "red " * 60
        text = tensor(module, "text", np.array([long.encode()], object), "BYTES")
        with pytest.raises(Exception, match="48 tokens"):
            client.infer("embedder", [text])
        found = client.infer("embedder", [text], parameters={"truncate": True}).as_numpy("embedding")
        exact(found, np.stack(local.encode([long])))

    def test_versions(self, triton):
        module, client = triton
        text = tensor(module, "text", np.array([b"a"], object), "BYTES")
        assert client.infer("embedder", [text], model_version="1").as_numpy("embedding").shape == (1, 32)
        with pytest.raises(Exception, match="no version '7'"):
            client.infer("embedder", [text], model_version="7")


def test_triton_without_binary_data(real, wanted):
    with triton_http.InferenceServerClient(real.url.removeprefix("http://")) as client:
        texts = triton_http.InferInput("text", [len(TEXTS)], "BYTES")
        texts.set_data_from_numpy(np.array(TEXTS, object), binary_data=False)
        asked = [triton_http.InferRequestedOutput("embedding", binary_data=False)]
        exact(client.infer("embedder", [texts], outputs=asked).as_numpy("embedding"), wanted)


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
        similar = {"source_sentence": "red", "sentences": [long]}
        assert client.post("/similarity", json={"inputs": similar}).status_code == 413

    def test_what_would_change_the_answer_is_refused(self, client):
        for more in ({"truncation_direction": "left"}, {"prompt_name": "query"}):
            assert client.post("/embed", json={"inputs": "a", **more}).status_code == 422
        assert client.post("/embed", json={"inputs": "a", "truncation_direction": "right"}).status_code == 200

    def test_a_long_sequence_is_decoded(self, client):
        assert client.post("/decode", json={"ids": [5] * 2000}).status_code == 200
        assert client.post("/decode", json={"ids": []}).status_code == 422
        assert client.post("/decode", json={"ids": [[5]] * 2000}).status_code == 413

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
