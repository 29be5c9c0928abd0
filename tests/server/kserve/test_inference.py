"""tritonclient over HTTP and gRPC gets the numbers that `CompiledModel.run` gives, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from running_server import exact

import turbo_tvm

pytestmark = pytest.mark.xdist_group("server")

TEXTS = ["the cat sat on a mat", "a dog ran", "fast", "red blue red blue the the slow park"]  # as the fixture `wanted`


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
