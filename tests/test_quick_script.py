"""The quick parser makes of TVMScript what TVM's own makes, errors included."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator

import pytest
import tvm
from tvm.script import tirx as T
from tvm.script.parser.core import diagnostics, evaluator, parser

from turbo_tvm import quick_script


@pytest.fixture
def tvms_own() -> Iterator[None]:
    """The parser as TVM wrote it, its way of finding itself included."""
    source = inspect.getsource(parser)
    assert "inspect.getouterframes" in source, "TVM finds its parser in another way: is find_parser still needed?"
    space: dict = {}
    exec(compile(source, parser.__file__, "exec"), {"__name__": parser.__name__, **vars(parser)}, space)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser.ScriptMacro, "_find_parser_def", space["ScriptMacro"]._find_parser_def)
        patch.setattr(diagnostics.Source, "__init__", quick_script._tvm_source)
        patch.setattr(diagnostics.Source, "as_ast", quick_script._tvm_as_ast)
        patch.setattr(evaluator.ExprEvaluator, "_visit", quick_script._tvm_visit)
        patch.setattr(evaluator, "_eval_expr", quick_script._tvm_eval_expr)
        patch.setattr(evaluator, "_eval_assign", quick_script._tvm_eval_assign)
        yield


def doubled() -> tvm.tirx.PrimFunc:
    @T.inline
    def double(x, i):
        x[i] = x[i] + x[i]

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4,), "float32")):
        for i in range(4):
            double(x, i)

    return kernel


def of_every_kind() -> tvm.tirx.PrimFunc:
    """Starred arguments, several targets, keywords, conditions, lambdas, comprehensions, attributes, nested macros."""
    sizes, options = (4, 8), {"dtype": "float32"}

    def least(*values):
        return min(values)

    @T.inline
    def scaled(x, y, at, scale=2.0):
        y[at] = x[at] * T.float32(scale)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer(sizes, "float32"), y: T.Buffer(sizes, "float32")):
        rows = T.alloc_buffer((least(*sizes),), **options)

        @T.inline
        def inner(at):
            rows[at] = x[at, sizes[-1] - 1] if sizes[0] == 4 and not sizes[1] < 8 else x[at, 0]

        for i, j in T.grid(*sizes):
            inner(i)
            scaled(x, y, (i, j), scale=float(sizes[1]))
            pair = T.meta_var([x[i, j], rows[i]])
            whole, part = pair
            y[i, j] += (lambda a: a)(sum([whole, part])) + T.Cast("float32", len(pair)) + T.max(*pair)
            y[i, j] = -y[i, j]

    return kernel


MAKERS = [doubled, of_every_kind]


@pytest.mark.parametrize("make", MAKERS)
def test_scripts_are_read_as_tvm_reads_them(make, request):
    mine = [make(), make()]  # the second from what the first left
    request.getfixturevalue("tvms_own")
    theirs = make()
    for function in mine:
        tvm.ir.assert_structural_equal(function, theirs)
        assert function.script() == theirs.script()


def test_threads_may_read_at_once():
    found: list[tvm.tirx.PrimFunc] = []
    threads = [threading.Thread(target=lambda: found.append(of_every_kind())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for function in found:
        tvm.ir.assert_structural_equal(function, of_every_kind())


def unknown_name():
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4,), "float32")):
        x[0] = nowhere  # noqa: F821

    return kernel


def wrong_argument():
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4,), "float32")):
        x[0] = T.exp(x[0], x[1], x[2])

    return kernel


def too_many_targets():
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4,), "float32")):
        a, b = [x[0], x[1], x[2]]
        x[0] = a + b

    return kernel


@pytest.mark.parametrize("make", [unknown_name, wrong_argument, too_many_targets])
def test_errors_are_those_of_tvm(make, request):
    def message() -> str:
        with pytest.raises(Exception) as caught:
            make()
        return f"{type(caught.value).__name__} {caught.value}"

    mine = message()
    request.getfixturevalue("tvms_own")
    assert mine == message()


def test_a_macro_outside_of_a_script_is_an_error():
    with pytest.raises(RuntimeError, match="outside TVMScript"):
        quick_script.find_parser(None)


def test_the_text_of_a_script_is_read_anew():
    """Text may be as large as a model, so no tree of it is kept."""
    text = doubled().script()
    for _ in range(2):
        tvm.ir.assert_structural_equal(tvm.script.from_source(text), doubled())
    assert text not in quick_script._known.trees
