from __future__ import annotations

from typing import TypeVar

import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.passes.canonicalize import canonicalize

b = TypeVar("b")
s = TypeVar("s")


def test_permutes_that_cancel_disappear():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s, 3, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                heads = R.permute_dims(x, axes=[0, 2, 1, 3])
                back = R.permute_dims(heads, axes=[0, 2, 1, 3])
                out = R.nn.relu(back)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, s, 3, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.nn.relu(x)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(canonicalize(Before, "main"), Expected)


def test_permutes_that_do_not_cancel_become_one():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s, 3, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                heads = R.permute_dims(x, axes=[0, 2, 1, 3])
                keys = R.permute_dims(heads, axes=[0, 1, 3, 2])
                R.output(keys)
            return keys

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, s, 3, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                keys = R.permute_dims(x, axes=[0, 2, 3, 1])
                R.output(keys)
            return keys

    tvm.ir.assert_structural_equal(canonicalize(Before, "main"), Expected)


def test_flattened_embedding_becomes_one_look_up():
    @I.ir_module
    class Before:
        @R.function
        def main(ids: R.Tensor((b, s), "int32"), table: R.Tensor((50, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                flat = R.reshape(ids, R.shape([b * s]))
                rows = R.take(table, flat, axis=0)
                out = R.reshape(rows, R.shape([b, s, 8]))
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(ids: R.Tensor((b, s), "int32"), table: R.Tensor((50, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.take(table, ids, axis=0, mode="clip")
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(canonicalize(Before, "main"), Expected)


def test_reshapes_casts_and_broadcasts_that_change_nothing_disappear():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                cast = R.astype(x, "float32")
                wide = R.broadcast_to(cast, R.shape([b, s, 8]))
                split = R.reshape(wide, R.shape([b, s, 2, 4]))
                whole = R.reshape(split, R.shape([b, s, 8]))
                out = R.nn.relu(whole)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, s, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.nn.relu(x)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(canonicalize(Before, "main"), Expected)


def test_a_transpose_of_a_flattened_batch_is_one_of_the_batch():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s, 2, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                heads = R.permute_dims(x, [0, 2, 1, 3])
                flat = R.reshape(heads, (b * 2, s, 8))
                turned = R.permute_dims(flat, [0, 2, 1])
                out = R.reshape(turned, (b, 2, 8, s))
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, s, 2, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.permute_dims(x, [0, 2, 3, 1])
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(canonicalize(Before, "main"), Expected)
