"""A small base for passes: rebuild a function binding by binding, looking back at what was built.

After import the model is one straight line of bindings in one dataflow block. A pass subclasses `Rewriter` and lists
its rules; a rule returns a new expression for a binding, or None to leave it alone. What became unused is removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from tvm import ir, relax
from tvm.sym.analyzer import Analyzer

from turbo_tvm.ops import Operator, UntileRows
from turbo_tvm.ops.call import match
from turbo_tvm.ops.inputs import input_params
from turbo_tvm.ops.operand import dims


class Rewriter:
    """Rebuilds one function of a module by `rules`: each takes a call, and returns its replacement or None.

    The first rule that answers wins. Rules look around with `definition`, `call_of`, `used_once` and `is_weight`, and
    bind further expressions with `emit`. (TVM expressions have no truth value: compare with None, never use `and`,
    `or` on them.)
    """

    def __init__(self, mod: ir.IRModule, function: str):
        self.mod, self.name = mod, function
        self.func: relax.Function = mod[function]
        self.builder = builder_without(mod, function)
        self.bound: dict[relax.Var, relax.Expr] = {}
        self.current: relax.Var | None = None  # the old variable whose value the rules are looking at
        self._inputs = set(input_params(self.func))
        self._uses = _count_uses(self.func)
        self._origin: dict[relax.Var, relax.Var] = {}
        self._new: dict[relax.Var, relax.Expr] = {}

    def rules(self) -> Sequence[Callable[[relax.Call], relax.Expr | None]]:
        """What to try on every call, in order; the call's arguments are already rewritten."""
        raise NotImplementedError

    def definition(self, expr: relax.Expr) -> relax.Expr:
        """What a variable of the new function is bound to, through plain copies; other expressions as they are."""
        while isinstance(expr, relax.Var) and expr in self.bound:
            expr = self.bound[expr]
        return expr

    def call_of(self, expr: relax.Expr, op: str) -> relax.Call | None:
        """The call of operator `op` (without "relax.") that `expr` is bound to, or None."""
        value = self.definition(expr)
        return value if is_call(value, op) else None

    def used_once(self, expr: relax.Expr) -> bool:
        """Whether the original of this variable has a single reader, so that fusing it away repeats no work."""
        return self.uses(expr) == 1

    def uses(self, expr: relax.Expr) -> int:
        """How often the original of this variable is read; 0 for what is no variable."""
        return self._uses[self._origin.get(expr, expr)] if isinstance(expr, relax.Var) else 0

    def is_weight(self, expr: relax.Expr) -> bool:
        """Whether it depends on neither an input nor a symbolic dimension."""
        pending, seen = list(relax.analysis.free_vars(expr)), set()
        while pending:  # a recursion would be as deep as the model
            var = pending.pop()
            if var in self._inputs or not is_tensor(var):
                return False
            if var in self.bound and var not in seen:
                pending.extend(relax.analysis.free_vars(self.bound[var]))
            seen.add(var)
        return True

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind a new expression and return its variable."""
        var = self.builder.emit(expr)
        self.bound[var] = expr
        return var

    def run(self) -> ir.IRModule:
        """Return the module with the function rewritten and dead bindings removed."""
        body = self.func.body
        with self.builder.function(self.name, list(self.func.params), attrs=dict(self.func.attrs or {})):
            with self.builder.dataflow():
                for block in body.blocks:
                    for binding in block.bindings:
                        self._visit(binding)
                outputs = self.builder.emit_output(substitute(body.body, self._new))
            self.builder.emit_func_output(outputs)
        return tidy(self.builder.finalize())

    def _visit(self, binding: relax.Binding) -> None:
        if not isinstance(binding, relax.VarBinding):
            raise ValueError(f"{type(binding).__name__} is not expected in an imported graph")
        self.current = binding.var
        value = substitute(binding.value, self._new)
        if isinstance(value, relax.Call):
            value = self._apply_rules(value)
        if isinstance(value, relax.Var | relax.Tuple):
            self._new[binding.var] = value
            return
        var = self.emit(value)
        self._origin.setdefault(var, binding.var)
        self._new[binding.var] = var

    def _apply_rules(self, call: relax.Call) -> relax.Expr:
        for rule in self.rules():
            replaced = rule(call)
            if replaced is not None:
                return replaced
        return call


def tidy(mod: ir.IRModule) -> ir.IRModule:
    """Remove bindings that nothing reads and plain copies."""
    roots = [var.name_hint for var, func in mod.functions_items() if isinstance(func, relax.Function)]
    return relax.transform.CanonicalizeBindings()(relax.transform.DeadCodeElimination(roots)(mod))


def terms_of(func: relax.Function) -> set[relax.Var]:
    """Variables that are only read by sums and products, which broadcast."""
    read: dict[relax.Var, bool] = {}
    for block in func.body.blocks:
        for binding in block.bindings:
            broadcasts = is_call(binding.value, "add") or is_call(binding.value, "multiply")
            for var in relax.analysis.free_vars(binding.value):
                read[var] = read.get(var, True) and broadcasts
    read.update(dict.fromkeys(relax.analysis.free_vars(func.body.body), False))
    return {var for var, terms_only in read.items() if terms_only}


def read_by_others(func: relax.Function) -> set[relax.Var]:
    """Return what something else than an operator of ours reads, or the function returns: its type is fixed.

    Rows that leave their tiles do so for an operator of TVM's, so `UntileRows` counts as one.
    """
    fixed: set[relax.Var] = set(relax.analysis.free_vars(func.body.body))
    for block in func.body.blocks:
        for binding in block.bindings:
            found = match(binding.value, Operator)
            if found is None or isinstance(found, UntileRows):
                fixed.update(relax.analysis.free_vars(binding.value))
    return fixed


def builder_without(mod: ir.IRModule, function: str) -> relax.BlockBuilder:
    """Return a builder that holds the module's other functions; a second one of that name would clash with it."""
    others = {var: func for var, func in mod.functions_items() if var.name_hint != function}
    return relax.BlockBuilder(ir.IRModule(others, attrs=mod.attrs))


def with_function(mod: ir.IRModule, function: str, func: relax.Function) -> ir.IRModule:
    """Return the module with another function of that name."""
    new = ir.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    new.update_func(new.get_global_var(function), func)
    return new


def is_call(expr: relax.Expr, op: str) -> bool:
    """Whether `expr` is a call of the Relax operator `op` (named without "relax.")."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op) and expr.op.name == "relax." + op


def operator_name(expr: relax.Expr) -> str:
    """Return the name of the Relax operator that is called, without "relax."; "" for anything else."""
    known = isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op)
    return expr.op.name.removeprefix("relax.") if known else ""


def has_symbolic_shape(expr: relax.Expr) -> bool:
    """Whether any dimension of a tensor, or of a tuple's tensors, is symbolic."""
    types = expr.ty.fields if isinstance(expr.ty, relax.TupleType) else [expr.ty]
    return any(not isinstance(d, int) for ty in types for d in dims(ty))


def is_tensor(var: relax.Var) -> bool:
    """Whether a variable is data; symbolic dimensions are variables too."""
    return not isinstance(var.ty, ir.PrimType)


def substitute(expr: relax.Expr, new: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """`expr` (one level of calls: the normal form) with variables replaced. Operators' types are inferred anew."""
    if isinstance(expr, relax.Var):
        return new.get(expr, expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(field, new) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        source = substitute(expr.tuple_value, new)
        return source.fields[expr.index] if isinstance(source, relax.Tuple) else relax.TupleGetItem(source, expr.index)
    if isinstance(expr, relax.Call):
        return relax.Call(expr.op, [substitute(arg, new) for arg in expr.args], expr.attrs, expr.ty_args)
    return expr


def shape_of(expr: relax.Expr) -> list:
    """The dimensions of a tensor expression, ints and symbolic expressions; [] if its shape is unknown."""
    return dims(expr)


def same_shape(left: list, right: list) -> bool:
    """Whether two shapes are provably equal, dimension by dimension."""
    analyzer = Analyzer()
    return len(left) == len(right) and all(analyzer.can_prove_equal(a, b) for a, b in zip(left, right, strict=True))


def scalar(expr: relax.Expr) -> float | None:
    """The value of a scalar constant, else None."""
    if isinstance(expr, ir.GenericConst) and expr.value.numpy().size == 1:
        return float(expr.value.numpy().reshape(()))
    return None


def _count_uses(func: relax.Function) -> Counter:
    uses: Counter = Counter()

    def count(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Var):
            uses[expr] += 1
        elif isinstance(expr, relax.Tuple):
            for field in expr.fields:
                count(field)
        elif isinstance(expr, relax.TupleGetItem):
            count(expr.tuple_value)
        elif isinstance(expr, relax.Call):
            for arg in expr.args:
                count(arg)

    for block in func.body.blocks:
        for binding in block.bindings:
            count(binding.value)
    count(func.body.body)
    return uses
