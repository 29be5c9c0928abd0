"""Pooling and normalisation around an encoder."""

from __future__ import annotations

import pytest
import torch
import transformers

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.sentence_modules import POOLING, DenseSpec, LayerNormSpec
from turbo_tvm.frontends.torch.sentence import SentenceEncoder


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=16)).eval()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 1 + [0] * 5])


@torch.inference_mode()
def test_mean_is_over_the_tokens_under_the_mask(encoder, batch):
    ids, mask = batch
    got = SentenceEncoder(encoder, "mean")(ids, mask)["sentence_embedding"]
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate(mask.sum(1)):
        torch.testing.assert_close(got[row], hidden[row, :length].mean(0))


@torch.inference_mode()
def test_cls_is_the_first_token(encoder, batch):
    ids, mask = batch
    got = SentenceEncoder(encoder, "cls")(ids, mask)["sentence_embedding"]
    torch.testing.assert_close(got, encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_normalised_vectors_have_length_one(encoder, batch, pooling):
    plain = SentenceEncoder(encoder, pooling)(*batch)["sentence_embedding"]
    got = SentenceEncoder(encoder, pooling, normalize=True)(*batch)["sentence_embedding"]
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(got * plain.norm(dim=1, keepdim=True), plain)


def test_other_pooling(encoder):
    with pytest.raises(UnsupportedModelError, match="pooling 'median' is not supported; cls, max, mean, "):
        SentenceEncoder(encoder, "median")
    with pytest.raises(UnsupportedModelError, match=r"pooling \(\) is not supported"):
        SentenceEncoder(encoder, ())


@torch.inference_mode()
@pytest.mark.parametrize("mode", POOLING)
def test_poolings_are_those_of_sentence_transformers(encoder, batch, mode):
    """On either side of the padding."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    for ids, mask in (batch, tuple(part.flip(1) for part in batch)):
        if mode == "cls" and not mask[:, 0].all():
            continue  # the encoder's own first token is what it always was here
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        wanted = Pooling(16, mode)({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
        torch.testing.assert_close(SentenceEncoder(encoder, mode)(ids, mask)["sentence_embedding"], wanted)


@torch.inference_mode()
def test_several_poolings_and_what_follows(encoder, batch):
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    dense, norm = Dense(32, 8, use_residual=True), LayerNorm(8)
    torch.nn.init.normal_(norm.norm.weight)
    then = [
        DenseSpec(
            *(p.detach().numpy() for p in dense.linear.parameters()), "Tanh", dense.residual.weight.detach().numpy()
        ),
        LayerNormSpec(norm.norm.weight.detach().numpy(), norm.norm.bias.detach().numpy()),
    ]
    ids, mask = batch
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    features = {"token_embeddings": hidden, "attention_mask": mask}
    for module in (Pooling(16, ("max", "mean")), dense, norm):
        features = module(features)
    got = SentenceEncoder(encoder, ("max", "mean"), then=then)(ids, mask)["sentence_embedding"]
    torch.testing.assert_close(got, features["sentence_embedding"])
