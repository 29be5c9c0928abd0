"""Embedding look-ups, their sums and the LayerNorm over them."""

from __future__ import annotations

import json
from typing import TypeVar

import pytest
import tvm
from operators import module_of, operators_of, others_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Embedding, Norm, Operator
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.fuse_embedding import fuse_embedding

t = TypeVar("t")

NORM = '{"eps": 1e-12, "tensors": ["x", "residual", "gamma", "beta"]}'
NAMES = ["ids", "ids", "ids", "tables", "tables", "tables", "gamma", "beta"]
FUSED = json.dumps({"norm_eps": 1e-12, "tensors": NAMES})


def test_three_look_ups_and_their_norm_become_one():
    @I.ir_module
    class Before:
        @R.function
        def main(
            ids: R.Tensor((t, 4), "int32"),
            kinds: R.Tensor((t, 4), "int32"),
            places: R.Tensor((t, 4), "int32"),
            word: R.Tensor((50, 8), "float32"),
            kind: R.Tensor((2, 8), "float32"),
            place: R.Tensor((16, 8), "float32"),
            gamma: R.Tensor((8,), "float32"),
            beta: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 3})
            with R.dataflow():
                w = R.take(word, ids, axis=0)
                k = R.take(kind, kinds, axis=0)
                both = R.add(w, k)
                p = R.take(place, places, axis=0)
                out = R.call_dps_packed(
                    "turbo.norm", (both, p, gamma, beta, R.str(NORM)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(
            ids: R.Tensor((t, 4), "int32"),
            kinds: R.Tensor((t, 4), "int32"),
            places: R.Tensor((t, 4), "int32"),
            word: R.Tensor((50, 8), "float32"),
            kind: R.Tensor((2, 8), "float32"),
            place: R.Tensor((16, 8), "float32"),
            gamma: R.Tensor((8,), "float32"),
            beta: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 3})
            with R.dataflow():
                out = R.call_dps_packed(
                    "turbo.embedding",
                    (ids, kinds, places, word, kind, place, gamma, beta, R.str(FUSED)),
                    out_ty=R.Tensor((t, 4, 8), "float32"),
                )
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(fuse_embedding(Before, "main"), Expected)


def fuse(body, dtype: str = "int32") -> tuple[list[Operator], list[str]]:
    """The operators of ours, and the names of TVM's, left of `body(emit, ids, x, word, gamma, beta)`."""
    tiles = tirx.Var("t", "int64")
    ids = relax.Var("ids", relax.TensorType((tiles, 4), dtype))
    x = relax.Var("x", relax.TensorType((tiles, 4, 8), "float32"))
    word = relax.Var("word", relax.TensorType((50, 8), "float32"))
    vectors = [relax.Var(name, relax.TensorType((8,), "float32")) for name in ("gamma", "beta")]
    before = module_of(
        [ids, x, word, *vectors], lambda emit, ids, x, word, *vectors: body(emit, ids, x, word, vectors), inputs=2
    )
    after = fuse_embedding(before, "main")
    return operators_of(after), others_of(after)


def look_up(emit, table, ids):
    return emit(relax.op.take(table, ids, axis=0))


def norm(emit, terms, vectors):
    (x, *residual), (gamma, beta) = terms, vectors
    made = Norm(x=x, residual=residual[0] if residual else None, gamma=gamma, beta=beta, eps=1e-5, out=x.ty)
    return emit(to_call(made))


def test_a_single_look_up():
    (embedding,), rest = fuse(lambda emit, ids, x, word, vectors: look_up(emit, word, ids))
    assert [(a.name, a.tensor.name) for a in embedding.arguments()] == [("ids", "ids"), ("tables", "word")]
    assert (len(embedding.tables), embedding.norm_eps, embedding.attributes()) == (1, None, {})
    assert rest == []


def test_a_single_look_up_and_its_norm():
    (embedding,), _ = fuse(lambda emit, ids, x, word, vectors: norm(emit, [look_up(emit, word, ids)], vectors))
    assert (len(embedding.tables), embedding.attributes()) == (1, {"norm_eps": 1e-5})
    assert [a.tensor.name for a in embedding.arguments()] == ["ids", "word", "gamma", "beta"]


def test_norm_of_a_look_up_that_something_else_reads_stays():
    def body(emit, ids, x, word, vectors):
        found = look_up(emit, word, ids)
        return relax.op.multiply(norm(emit, [found], vectors), found)

    found, _ = fuse(body)
    assert [type(f) for f in found] == [Embedding, Norm]
    assert found[0].norm_eps is None


@pytest.mark.parametrize("normalised", [False, True])
def test_sum_with_anything_else_is_left_alone(normalised):
    def body(emit, ids, x, word, vectors):
        terms = [look_up(emit, word, ids), x]
        return norm(emit, terms, vectors) if normalised else relax.op.add(*terms)

    found, rest = fuse(body)
    assert [type(f) for f in found] == [Embedding, Norm][: 1 + normalised]
    assert rest == ["relax.add"][normalised:]


@pytest.mark.parametrize("normalised", [False, True])
def test_sum_of_a_look_up_with_itself_is_left_alone(normalised):
    def body(emit, ids, x, word, vectors):
        found = look_up(emit, word, ids)
        return norm(emit, [found, found], vectors) if normalised else relax.op.add(found, found)

    found, rest = fuse(body)
    assert [type(f) for f in found] == [Embedding, Norm][: 1 + normalised]
    assert rest == ["relax.add"][normalised:]


def test_normalised_look_ups_are_not_summed():
    def body(emit, ids, x, word, vectors):
        return relax.op.add(norm(emit, [look_up(emit, word, ids)], vectors), look_up(emit, word, ids))

    found, rest = fuse(body)
    assert ([type(f) for f in found], rest) == ([Embedding, Embedding], ["relax.add"])


def test_a_second_norm_stays():
    found, _ = fuse(lambda e, ids, x, word, vs: norm(e, [norm(e, [look_up(e, word, ids)], vs)], vs))
    assert [type(f) for f in found] == [Embedding, Norm]


def test_ids_of_another_type_are_left_alone():
    found, rest = fuse(lambda emit, ids, x, word, vectors: look_up(emit, word, ids), dtype="int64")
    assert (found, rest) == ([], ["relax.take"])


def test_look_ups_among_weights_are_left_alone():
    def body(emit, ids, x, word, vectors):
        chosen = look_up(emit, word, relax.const([[1, 2]], "int32"))
        return relax.op.add(x, emit(relax.op.sum(chosen, axis=[0, 1])))

    found, rest = fuse(body)
    assert found == [] and rest[0] == "relax.take"


def test_columns_of_a_table_are_left_alone():
    def body(emit, ids, x, word, vectors):
        return emit(relax.op.take(word, ids, axis=1))

    assert fuse(body)[0] == []
