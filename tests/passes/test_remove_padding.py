"""Packed rows in place of padded ones, or a reason why not."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from operators import operators_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Norm, Pool
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.remove_padding import Declined, remove_padding

b = TypeVar("b")
s = TypeVar("s")
tiles = TypeVar("tiles")
boundaries = TypeVar("boundaries")
queries = TypeVar("queries")

HEADS = '"first_columns": [0, 0, 0], "head_dim": 4, "heads": 2, "max_length": 16, "scale": 0.5'
PADDED_ATTENTION = f'{{{HEADS}, "tensors": ["q", "k", "v", "mask"]}}'
PACKED_ATTENTION = f'{{{HEADS}, "tensors": ["q", "k", "v", "query_tiles"]}}'
PADDED_MEAN = '{"mode": "mean", "tensors": ["x", "mask"]}'
PACKED_MEAN = '{"mode": "mean", "tensors": ["x", "cu_seqlens"]}'
UNIT = '{"eps": 1e-12, "tensors": ["x"]}'


def test_token_rows_and_sequence_rows():
    @I.ir_module
    class Before:
        @R.function
        def main(
            input_ids: R.Tensor((b, s), "int64"),
            attention_mask: R.Tensor((b, s), "int64"),
            table: R.Tensor((50, 8), "float32"),
            gamma: R.Tensor((8,), "float32"),
            beta: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                ids = R.astype(input_ids, "int32")
                x = R.take(table, ids, axis=0, mode="fast")
                y = R.call_dps_packed(
                    "turbo.attention",
                    (x, x, x, attention_mask, R.str(PADDED_ATTENTION)),
                    out_ty=R.Tensor((b, s, 8), "float32"),
                )
                z = R.nn.layer_norm(y, gamma, beta, axes=[2])
                pooled = R.call_dps_packed(
                    "turbo.pool", (z, attention_mask, R.str(PADDED_MEAN)), out_ty=R.Tensor((b, 8), "float32")
                )
                unit = R.call_dps_packed("turbo.normalize", (pooled, R.str(UNIT)), out_ty=R.Tensor((b, 8), "float32"))
                out = (z, unit)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(
            input_ids: R.Tensor((tiles, 4), "int32"),
            cu_seqlens: R.Tensor((boundaries,), "int32"),
            query_tiles: R.Tensor((queries, 3), "int32"),
            table: R.Tensor((50, 8), "float32"),
            gamma: R.Tensor((8,), "float32"),
            beta: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 3})
            with R.dataflow():
                x = R.take(table, input_ids, axis=0, mode="fast")
                y = R.call_dps_packed(
                    "turbo.attention",
                    (x, x, x, query_tiles, R.str(PACKED_ATTENTION)),
                    out_ty=R.Tensor((tiles, 4, 8), "float32"),
                )
                z = R.nn.layer_norm(y, gamma, beta, axes=[-1])
                pooled = R.call_dps_packed(
                    "turbo.pool",
                    (z, cu_seqlens, R.str(PACKED_MEAN)),
                    out_ty=R.Tensor(((boundaries - 1 + 4 - 1) // 4, 4, 8), "float32"),
                )
                unit = R.call_dps_packed(
                    "turbo.normalize",
                    (pooled, R.str(UNIT)),
                    out_ty=R.Tensor(((boundaries - 1 + 4 - 1) // 4, 4, 8), "float32"),
                )
                out = (z, unit)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(remove_padding(Before, "main", 4), Expected)


class Graph:
    """Inputs of a tiny encoder and what the tests emit over them."""

    def __init__(self):
        self.shape = tirx.Var("b", "int64"), tirx.Var("s", "int64")
        self.ids = relax.Var("input_ids", relax.TensorType(self.shape, "int32"))
        self.mask = relax.Var("attention_mask", relax.TensorType(self.shape, "int64"))
        self.extra: list[relax.Var] = []
        self.weights: list[relax.Var] = []
        self.builder = relax.BlockBuilder()
        self.emit = self.builder.emit
        self.table = self.weight(50, 8)

    def weight(self, *shape: int) -> relax.Var:
        self.weights.append(relax.Var(f"w{len(self.weights)}", relax.TensorType(shape, "float32")))
        return self.weights[-1]

    def input(self, shape: tuple, dtype: str = "int32") -> relax.Var:
        self.extra.append(relax.Var("extra", relax.TensorType(shape, dtype)))
        return self.extra[-1]

    def tokens(self) -> relax.Var:
        """(b, s, 8)"""
        return self.emit(relax.op.take(self.table, self.ids, axis=0))

    def scores(self) -> relax.Var:
        """(b, s): one number per token."""
        one = self.emit(relax.op.matmul(self.tokens(), self.weight(8, 1)))
        return self.emit(relax.op.squeeze(one, [-1]))

    def pooled(self) -> relax.Var:
        """(b, 8)"""
        out = relax.TensorType((self.shape[0], 8), "float32")
        return self.emit(to_call(Pool(x=self.tokens(), mask=self.mask, mode="first", out=out)))


def build(body) -> tvm.IRModule:
    """`main` that returns `body(graph)`; the weights and inputs that it asks for become parameters."""
    probe = Graph()
    with probe.builder.function("probe", [probe.ids, probe.mask]):
        with probe.builder.dataflow():
            out = body(probe)
            out = probe.builder.emit_output(out)
        probe.builder.emit_func_output(out)
    func = probe.builder.finalize()["probe"]
    inputs = [probe.ids, probe.mask, *probe.extra]
    main = relax.Function([*inputs, *probe.weights], func.body, func.ret_ty).with_attr("num_input", len(inputs))
    return relax.transform.Normalize()(tvm.IRModule({"main": main.with_attr("global_symbol", "main")}))


def pack(body) -> relax.Function:
    return remove_padding(build(body), "main", 4)["main"]


def shapes(func: relax.Function) -> list[list]:
    """The shapes of the outputs, symbolic dimensions by name."""
    types = func.ret_ty.fields if isinstance(func.ret_ty, relax.TupleType) else [func.ret_ty]
    return [[d.name if isinstance(d, tirx.Var) else int(d) for d in ty.shape.values] for ty in types]


KEPT = {
    "gelu": lambda g: relax.op.nn.gelu(g.tokens()),
    "sum of two": lambda g: relax.op.add(g.tokens(), g.tokens()),
    "bias": lambda g: relax.op.add(g.tokens(), g.weight(8)),
    "bias with leading ones": lambda g: relax.op.add(g.tokens(), g.weight(1, 1, 8)),
    "scalar": lambda g: relax.op.multiply(g.tokens(), relax.const(2.0, "float32")),
    "one number per row": lambda g: relax.op.multiply(g.tokens(), g.emit(relax.op.matmul(g.tokens(), g.weight(8, 1)))),
    "product": lambda g: relax.op.matmul(g.tokens(), g.weight(8, 8)),
    "softmax over columns": lambda g: relax.op.nn.softmax(g.tokens(), axis=2),
    "cast": lambda g: relax.op.astype(g.tokens(), "float16"),
    "clip": lambda g: relax.op.clip(g.tokens(), -1.0, 1.0),
}


@pytest.mark.parametrize("operator", KEPT)
def test_row_wise_operators_carry_over(operator):
    assert shapes(pack(KEPT[operator])) == [["tiles", 4, 8]]


def test_one_number_per_token():
    assert shapes(pack(lambda g: relax.op.tanh(g.scores()))) == [["tiles", 4]]
    assert shapes(pack(lambda g: relax.op.add(g.scores(), g.weight(1)))) == [["tiles", 4]]


def test_columns_are_split():
    def body(g):
        halves = g.emit(relax.op.split(g.tokens(), 2, axis=-1))
        return relax.Tuple([g.emit(relax.TupleGetItem(halves, i)) for i in range(2)])

    assert shapes(pack(body)) == [["tiles", 4, 4]] * 2


def test_sequence_rows_carry_over():
    func = pack(lambda g: relax.op.nn.softmax(g.emit(relax.op.matmul(g.pooled(), g.weight(8, 3))), axis=1))
    (ty,) = [func.ret_ty]
    assert [int(d) for d in ty.shape.values[1:]] == [4, 3]


def test_what_is_computed_from_the_mask_alone_disappears():
    def body(g):
        wide = g.emit(relax.op.astype(g.mask, "float32"))
        g.emit(relax.op.sum(wide, axis=[1]))
        return g.tokens()

    assert [p.name for p in pack(body).params] == ["input_ids", "cu_seqlens", "query_tiles", "w0"]


def _masked(g):
    wide = g.emit(relax.op.expand_dims(g.emit(relax.op.astype(g.mask, "float32")), [2]))
    return relax.op.multiply(g.tokens(), wide)


def _weight_per_position(g):
    return relax.op.add(g.tokens(), g.weight(1, 16, 8))


def _padded_length(g):
    length = g.emit(relax.op.full((), relax.const(1.0, "float32"), "float32"))
    total = g.emit(relax.op.sum(g.emit(relax.op.zeros(g.shape, "float32"))))
    return relax.op.divide(g.tokens(), g.emit(relax.op.add(length, total)))


def _mixed(g):
    return relax.op.add(g.tokens(), g.emit(relax.op.reshape(g.pooled(), (g.shape[0], 1, 8))))


def _tokens_and_sequences(g):
    return relax.op.add(g.emit(relax.op.squeeze(g.emit(relax.op.matmul(g.pooled(), g.weight(8, 1))), [-1])), g.scores())


def _turbo(g):
    x = g.tokens()
    return to_call(Norm(x=x, gamma=g.weight(8), beta=g.weight(8), eps=1e-5, out=x.ty))


DECLINED = {
    "sum over tokens": (lambda g: relax.op.sum(g.tokens(), axis=[1]), "relax.sum is not known to treat rows alike"),
    "sum over columns": (lambda g: relax.op.sum(g.tokens(), axis=[2]), "relax.sum is not known to treat rows alike"),
    "softmax over tokens": (lambda g: relax.op.nn.softmax(g.tokens(), axis=1), "relax.nn.softmax is not known"),
    "softmax over one number per token": (
        lambda g: relax.op.nn.softmax(g.scores(), axis=-1),
        "relax.nn.softmax is not known to treat rows alike",
    ),
    "norm over tokens": (
        lambda g: relax.op.nn.layer_norm(g.scores(), g.weight(8), g.weight(8), axes=[-1]),
        "relax.nn.layer_norm is not known",
    ),
    "shift by a token": (
        lambda g: relax.op.permute_dims(g.emit(relax.op.permute_dims(g.tokens(), [1, 0, 2])), [1, 0, 2]),
        "relax.permute_dims is not known to treat rows alike",
    ),
    "product of activations": (
        lambda g: relax.op.matmul(g.tokens(), g.emit(relax.op.permute_dims(g.tokens(), [0, 2, 1]))),
        "relax.permute_dims is not known",
    ),
    "product with a weight per batch": (
        lambda g: relax.op.matmul(g.tokens(), g.weight(1, 8, 8)),
        "relax.matmul is not known",
    ),
    "weight per position": (_weight_per_position, "relax.add .* a weight that differs from row to row"),
    "mask": (_masked, "it reads the attention mask"),
    "padded length": (_padded_length, "computes from the padded shape"),
    "pooled rows beside tokens": (_mixed, "relax.reshape is not known to treat rows alike"),
    "tokens and sequences": (_tokens_and_sequences, "relax.add combines rows of tokens with rows of sequences"),
    "number and vector per row": (
        lambda g: relax.op.add(g.tokens(), g.scores()),
        "relax.add combines one number per row with a vector per row",
    ),
    "arithmetic on ids": (lambda g: relax.op.add(g.ids, g.ids), "relax.add is applied to token ids"),
    "look-up along columns": (
        lambda g: relax.op.take(g.weight(8, 50), g.ids, axis=1),
        "relax.take is applied to token ids",
    ),
    "look-up in a vector": (lambda g: relax.op.take(g.weight(50), g.ids), "relax.take is applied to token ids"),
    "constant output": (lambda g: g.weight(8), "an output does not depend on the tokens"),
    "constant among the outputs": (
        lambda g: relax.Tuple([g.tokens(), g.weight(8)]),
        "an output does not depend on the tokens",
    ),
    "ids among the outputs": (lambda g: relax.Tuple([g.tokens(), g.ids]), "an output does not depend on the tokens"),
    "an operator without a packed form": (_turbo, "turbo.norm has no packed form"),
    "input of another shape": (
        lambda g: relax.op.take(g.table, g.input((g.shape[0], 5)), axis=0),
        "the input extra does not hold one number per token",
    ),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_anything_else_is_declined_with_its_name(reason):
    body, message = DECLINED[reason]
    before = build(body)
    text = before.script()
    with pytest.raises(Declined, match=message):
        remove_padding(before, "main", 4)
    assert before.script() == text


def test_what_no_output_reads_is_not_declined():
    def body(g):
        g.emit(relax.op.sum(g.tokens(), axis=[1]))
        return g.tokens()

    assert shapes(pack(body)) == [["tiles", 4, 8]]


def pools(*tokens: int | None) -> tvm.IRModule:
    """`main(patches (b, 5, 6), ids, mask)`: the patches themselves, pooled in each of these ways."""
    batch = tirx.Var("b", "int64")
    patches = relax.Var("patches", relax.TensorType((batch, 5, 6), "float32"))
    ids, mask = (relax.Var(name, relax.TensorType((batch, 5), "int64")) for name in ("position_ids", "attention_mask"))
    out = relax.TensorType((batch, 6), "float32")
    bb = relax.BlockBuilder()
    with bb.function("main", [patches, mask, ids], attrs={"num_input": 3}):
        with bb.dataflow():
            made = [Pool(x=patches, mask=mask, mode="first", token=token, out=out) for token in tokens]
            pooled = [bb.emit(to_call(pool)) for pool in made]
            result = bb.emit_output(relax.Tuple(pooled))
        bb.emit_func_output(result)
    return bb.finalize()


def test_patches_are_rows_and_tokens_are_pooled_by_their_rows():
    mod = remove_padding(pools(None, 7, 7), "main", 4)
    main = mod["main"]
    assert [p.name for p in main.params] == ["patches", "position_ids", "cu_seqlens", "query_tiles", "pooled_rows"]
    assert main.params[0].ty.shape.values[2] == 6 and str(main.params[0].ty.dtype) == "float32"
    found = operators_of(mod, Pool)
    assert [t.name for f in found for t in f.tensors[1:]] == ["cu_seqlens", *["pooled_rows"] * 2]
    assert [(f.cu_seqlens is None, f.pooled_rows is None) for f in found] == [(False, True), *[(True, False)] * 2]


def test_two_different_tokens_are_declined():
    with pytest.raises(Declined, match=r"the tokens \[7, 9\] are pooled; one of them is supported"):
        remove_padding(pools(7, 9), "main", 4)
