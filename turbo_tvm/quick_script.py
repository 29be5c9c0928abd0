"""Makes TVM's parser of TVMScript quick; what it makes of a kernel stays the same.

A kernel is some hundred uses of macros, and TVM 0.27 repeats for each what depends on its text alone. `install` puts in
its place:

- the parser that runs is found in the frames alone, not with every frame's source text beside it,
- the source of a function is looked up and turned into a syntax tree once, not at every definition and every use,
- names and numbers are not given a place in the source: nothing is built from one alone,
- an expression whose parts are known is evaluated where it stands; TVM translates it into Python's syntax tree,
  compiles that and runs it. What is not of a plain kind goes TVM's way.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from tvm.script.parser.core import diagnostics, doc, evaluator, parser

_SOURCE_FIELDS = ("source_name", "start_line", "start_column", "source", "full_source")
_A_TEXT = "<str>"  # what TVM calls the file of a source that was given as text
_NOT_PLAIN = object()
_BUILTINS = evaluator.__dict__["__builtins__"]
_BUILTINS = _BUILTINS if isinstance(_BUILTINS, dict) else vars(_BUILTINS)
# Calls from a frame whose globals are the script's names: there a macro finds its parser.
_CALL = compile("__tvm_call__()", "<TVMScript>", "eval")

_tvm_source = diagnostics.Source.__init__
_tvm_as_ast = diagnostics.Source.as_ast
_tvm_visit = evaluator.ExprEvaluator._visit
_tvm_eval_expr = evaluator._eval_expr
_tvm_eval_assign = evaluator._eval_assign


def install() -> None:
    """Make the parser quick, for this process. Safe to repeat."""
    parser.ScriptMacro._find_parser_def = find_parser
    diagnostics.Source.__init__ = read_source
    diagnostics.Source.as_ast = syntax_tree
    evaluator.ExprEvaluator._visit = visit
    evaluator._eval_expr = evaluate
    evaluator._eval_assign = assign


def find_parser(self: parser.ScriptMacro) -> Any:
    """Return the parser whose macro use is being expanded: the nearest frame's that has one."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_globals.get(parser.ScriptMacro.parser_object_name)
        if found is not None:
            return found
        frame = frame.f_back
    raise RuntimeError("a TVMScript macro was used outside TVMScript")


def read_source(self: diagnostics.Source, program: Any) -> None:
    """Find the source of a function, class or text, once for all functions that are made by the same `def`."""
    if not inspect.isfunction(program):
        _tvm_source(self, program)
        return
    code = program.__code__
    sources = _known.sources
    key = code, code.co_filename  # equal code may stand in two files
    if key not in sources:
        _tvm_source(self, program)
        sources[key] = tuple(getattr(self, field) for field in _SOURCE_FIELDS)
    for field, value in zip(_SOURCE_FIELDS, sources[key], strict=True):
        setattr(self, field, value)


def syntax_tree(self: diagnostics.Source) -> Any:
    """Return the syntax tree of a source; a function's is made once per thread, as the parser changes it."""
    if self.source_name == _A_TEXT:
        return _tvm_as_ast(self)
    trees = _known.trees
    if self.source not in trees:
        trees[self.source] = _Tree(_tvm_as_ast(self))
    return trees[self.source].as_written()


class _Tree:
    """A syntax tree, and what the parser changes in it: the decorators and places of functions within functions."""

    def __init__(self, root: Any):
        self._root = root
        self._functions = [(node, self._written(node)) for node in _functions_within(root)]

    def as_written(self) -> Any:
        for node, fields in self._functions:
            vars(node).update(fields, decorator_list=list(fields["decorator_list"]))
        return self._root

    @staticmethod
    def _written(node: Any) -> dict[str, Any]:
        fields = ("decorator_list", "lineno", "col_offset", "end_lineno", "end_col_offset")
        written = {field: getattr(node, field) for field in fields}
        return written | {"decorator_list": list(node.decorator_list)}


def _functions_within(root: Any) -> list[Any]:
    """Return the functions of a tree that are not at its top."""
    found: list[Any] = []

    class Collect(doc.NodeVisitor):
        def visit_FunctionDef(self, node: Any) -> None:
            found.append(node)
            self.generic_visit(node)

    Collect().visit(root)
    return [node for node in found if node not in root.body]


class _Known(threading.local):
    """What this thread has read."""

    def __init__(self) -> None:
        self.sources: dict[Any, tuple[Any, ...]] = {}
        self.trees: dict[str, _Tree] = {}


_known = _Known()


def visit(self: evaluator.ExprEvaluator, node: Any) -> Any:
    """Evaluate the parts of an expression."""
    if type(node) in _LEAVES or (type(node) is doc.Name and node.id in self.value_table):
        return node
    return _tvm_visit(self, node)


def evaluate(node: Any, names: dict[str, Any] | None) -> Any:
    """Return the value of an expression whose parts have been evaluated and are named in `names`."""
    plain = _PLAIN.get(type(node))
    value = plain(node, names) if plain is not None and names is not None else _NOT_PLAIN
    return _tvm_eval_expr(node, names) if value is _NOT_PLAIN else value


def _name(node: Any, names: dict[str, Any]) -> Any:
    if node.id in names:
        return names[node.id]
    return _BUILTINS.get(node.id, _NOT_PLAIN)


def _attribute(node: Any, names: dict[str, Any]) -> Any:
    return getattr(evaluate(node.value, names), node.attr)


def _subscript(node: Any, names: dict[str, Any]) -> Any:
    return evaluate(node.value, names)[evaluate(node.slice, names)]


def _sequence(make: Callable[[list[Any]], Any]) -> Callable[[Any, dict[str, Any]], Any]:
    def of(node: Any, names: dict[str, Any]) -> Any:
        if any(isinstance(element, doc.Starred) for element in node.elts):
            return _NOT_PLAIN
        return make([evaluate(element, names) for element in node.elts])

    return of


def _call(node: Any, names: dict[str, Any]) -> Any:
    if any(isinstance(argument, doc.Starred) for argument in node.args) or any(k.arg is None for k in node.keywords):
        return _NOT_PLAIN
    function = evaluate(node.func, names)
    arguments = [evaluate(argument, names) for argument in node.args]
    keywords = {keyword.arg: evaluate(keyword.value, names) for keyword in node.keywords}
    return eval(_CALL, names, {"__tvm_call__": functools.partial(function, *arguments, **keywords)})


_PLAIN: dict[type, Callable[[Any, dict[str, Any]], Any]] = {
    doc.Name: _name,
    doc.Constant: lambda node, _names: node.value,
    doc.Attribute: _attribute,
    doc.Subscript: _subscript,
    doc.Tuple: _sequence(tuple),
    doc.List: _sequence(list),
    doc.Call: _call,
}
_LEAVES = frozenset(
    kind
    for kind in vars(doc).values()
    if isinstance(kind, type)
    and issubclass(kind, doc.Constant | doc.expr_context | doc.operator | doc.boolop | doc.unaryop | doc.cmpop)
)


def assign(target: Any, source: Any) -> dict[str, Any]:
    """Return the values by name that an assignment of `source` to `target` gives."""
    if isinstance(target, doc.Name):
        return {target.id: source}
    if isinstance(target, doc.Tuple | doc.List) and all(isinstance(element, doc.Name) for element in target.elts):
        values = list(source)
        if len(values) == len(target.elts):
            return {element.id: value for element, value in zip(target.elts, values, strict=True)}
        source = values  # TVM says what is wrong
    return _tvm_eval_assign(target, source)
