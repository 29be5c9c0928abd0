"""The memory plan: random straight-line graphs are planned, checked, and run beside what TVM allocates itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te, tirx

from turbo_tvm.passes.plan_memory import Buffer, plan_memory
from turbo_tvm.passes.remove_padding import sequence_tiles
from turbo_tvm.runtime.buffers import Buffers
from turbo_tvm.runtime.manifest import BufferSpec

ROW_TILE = 4
COLUMNS = (0, 2, 6)  # 0: rank 2


def rows(count, columns: int) -> tuple:
    return (count, ROW_TILE, columns) if columns else (count, ROW_TILE)


@cache
def kernel(op: str, a_columns: int, b_columns: int, columns: int) -> tirx.PrimFunc:
    """A trivial kernel: `mix` adds two tensors of rows, `pool` makes rows of the first tile, `flat` reads a view."""
    n, p = (tirx.Var(name, "int64") for name in "np")
    flat = (n, ROW_TILE * a_columns)
    a = te.placeholder(flat if op == "flat" else rows(n, a_columns), "float32", "a")
    b = te.placeholder(rows(n, b_columns), "float32", "b")

    def at(x, width, i, r, j):
        return x[i, r, j[0] % width if j else 0] if width else x[i, r]

    def value(i, r, *j):
        if op == "mix":
            return at(a, a_columns, i, r, j) + at(b, b_columns, i, r, j) * 0.5
        return a[i, r] + 1.0 if op == "flat" else at(a, a_columns, 0, r, j) + r.astype("float32")

    out = te.compute(rows(p if op == "pool" else n, columns), value, op)
    inputs = [a, b] if op == "mix" else [a]
    func = te.create_prim_func([*inputs, out])
    return func.without_attr("global_symbol").with_attr("tirx.noalias", True)


Step = tuple[str, int, int, int]  # operator, operands (counted from the latest value), columns


class Graph:
    """A model that makes tensors of packed rows by trivial kernels; `values` are those made so far."""

    def __init__(self, first_columns: int = 6):
        self.tiles, boundaries = tirx.Var("tiles", "int64"), tirx.Var("boundaries", "int64")
        self.sequences = sequence_tiles(boundaries, ROW_TILE)
        self.x = relax.Var("x", relax.TensorType(rows(self.tiles, 0), "float32"))
        self.cu_seqlens = relax.Var("cu_seqlens", relax.TensorType((boundaries,), "int32"))
        self.builder = relax.BlockBuilder()
        self.values: list[tuple[relax.Var, str, int]] = []
        self.first_columns = first_columns

    def build(self, steps: list[Step], outputs: list[int]) -> tvm.IRModule:
        """`main(x, cu_seqlens)` of these steps that returns these values (counted from the latest)."""
        with self.builder.function("main", [self.x, self.cu_seqlens], attrs={"num_input": 2}):
            with self.builder.dataflow():
                self._call("mix", [self.x, self.x], [0, 0], "token", self.first_columns)
                for step in steps:
                    self._step(*step)
                made = [self.values[-1 - i % len(self.values)][0] for i in dict.fromkeys(outputs)]
                out = self.builder.emit_output(made[0] if len(made) == 1 else relax.Tuple(made))
            self.builder.emit_func_output(out)
        return self.builder.finalize()

    def _step(self, op: str, left: int, right: int, columns: int) -> None:
        a, kind, width = self.values[-1 - left % len(self.values)]
        if op == "pool":
            sources = [v for v in self.values if v[1] == "token"]
            a, _, width = sources[-1 - left % len(sources)]
            self._call("pool", [a], [width, 0], "sequence", columns)
        elif op == "view" and width:
            count = self.tiles if kind == "token" else self.sequences
            flat = self.builder.emit(relax.op.reshape(a, (count, ROW_TILE * width)))
            self._call("flat", [flat], [width, 0], kind, columns)
        else:
            others = [v for v in self.values if v[1] == kind]
            b, _, b_width = others[-1 - right % len(others)]
            self._call("mix", [a, b], [width, b_width], kind, columns)

    def _call(self, op: str, arguments: list, widths: list[int], kind: str, columns: int) -> None:
        count = self.tiles if kind == "token" else self.sequences
        func = self.builder.add_func(kernel(op, *widths, columns), f"{op}_{widths[0]}_{widths[1]}_{columns}")
        out = relax.TensorType(rows(count, columns), "float32")
        self.values.append((self.builder.emit(relax.op.call_tir(func, arguments, out)), kind, columns))


def lowered(mod: tvm.IRModule) -> tvm.IRModule:
    """The pipeline's lowering up to where the plan is made, without fusion: every kernel keeps its tensor."""
    t = relax.transform
    steps = [t.LegalizeOps(), t.RewriteDataflowReshape(), t.ToNonDataflow(), t.RemovePurityChecking()]
    return tvm.transform.Sequential([*steps, t.CallTIRRewrite()])(mod)


def executable(mod: tvm.IRModule) -> relax.VirtualMachine:
    """What follows the plan, and a machine for it."""
    t = relax.transform
    steps = [t.StaticPlanBlockMemory(), t.LowerAllocTensor(), t.KillAfterLastUse(), t.LowerRuntimeBuiltin()]
    steps += [t.ComputePrimValue(), t.VMShapeLower(), t.AttachGlobalSymbol()]
    built = tvm.compile(mod, target="llvm", relax_pipeline=tvm.transform.Sequential(steps))
    return relax.VirtualMachine(built, tvm.cpu())


def bindings(mod: tvm.IRModule) -> Iterator[tuple[int, relax.Var, relax.Expr]]:
    every = [b for block in mod["main"].body.blocks for b in block.bindings]
    return ((step, b.var, b.value) for step, b in enumerate(every))


def is_allocation(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and "alloc_tensor" in str(value.op)


def is_kernel(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)


class Memory:
    """Runs a lowered `main` on names in place of numbers: every tensor holds the expression that it was given.

    A buffer holds what was last written to its slot, so whoever reads a tensor that was overwritten gets another name.
    """

    def __init__(self, mod: tvm.IRModule, buffers: tuple[Buffer, ...] = ()):
        params = mod["main"].params
        self.slot = {p: b.slot for p, b in zip(params[len(params) - len(buffers) :], buffers, strict=True)}
        self.held: dict = {p: p.name for p in params if p not in self.slot}
        self.same_as: dict[relax.Var, relax.Var] = {}
        for _, var, value in bindings(mod):
            self._run(var, value)
        out = mod["main"].body.body
        self.outputs = self.read(out)

    def _run(self, var: relax.Var, value: relax.Expr) -> None:
        if is_allocation(value):
            self.held[var] = "nothing"
        elif is_kernel(value):
            *arguments, out = value.args
            name = f"{value.op.name_hint}({', '.join(str(self.read(a)) for a in arguments)})"
            self.held[self._place(out)] = str(hash(name))
        else:
            views = value.fields if isinstance(value, relax.Tuple) else [value]
            self.same_as[var] = [v.args[0] if isinstance(v, relax.Call) else v for v in views]

    def _place(self, var: relax.Var):
        """Where a tensor lies: its slot, or itself if TVM allocates it."""
        while var in self.same_as:
            (var,) = self.same_as[var]
        return self.slot.get(var, var)

    def read(self, var: relax.Expr):
        fields = self.same_as.get(var, [])
        if len(fields) > 1:
            return tuple(self.read(f) for f in fields)
        return self.held[self._place(var)]


def peak(mod: tvm.IRModule, kind_of) -> dict:
    """How many tensors of each kind are alive at most, from their first write to their last reader or the end."""
    source: dict[relax.Var, list] = {}

    def roots(var):
        return [r for s in source[var] for r in roots(s)] if var in source else [var]

    alive: dict[relax.Var, list[int]] = {}
    for step, var, value in bindings(mod):
        read = [v for v in relax.analysis.free_vars(value) if isinstance(v.ty, relax.TensorType | relax.TupleType)]
        if is_allocation(value):
            alive[var] = [step, step]
        elif not is_kernel(value):
            source[var] = read
        for root in (r for v in read for r in roots(v)):
            if root in alive:
                alive[root][1] = step
    for root in roots(mod["main"].body.body):
        alive[root][1] = step + 1
    counts: dict = {}
    for now in range(step + 1):
        for kind in {kind_of(v) for v in alive}:
            living = sum(kind_of(v) == kind and first <= now <= last for v, (first, last) in alive.items())
            counts[kind] = max(counts.get(kind, 0), living)
    return counts


steps = st.lists(
    st.tuples(
        st.sampled_from(["mix", "mix", "mix", "view", "pool"]),
        st.integers(0, 4),
        st.integers(0, 4),
        st.sampled_from(COLUMNS),
    ),
    max_size=12,
)
outputs = st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True)


@settings(max_examples=100, deadline=None)
@given(steps, outputs)
def test_nothing_is_overwritten_before_its_last_reader(steps, outputs):
    before = lowered(Graph().build(steps, outputs))
    after, buffers = plan_memory(before)
    assert Memory(after, buffers).outputs == Memory(before).outputs
    assert not any(is_allocation(value) for _, _, value in bindings(after))


@settings(max_examples=50, deadline=None)
@given(steps, outputs)
def test_slots_are_as_few_as_tensors_are_alive(steps, outputs):
    graph = Graph()
    before = lowered(graph.build(steps, outputs))
    _, buffers = plan_memory(before)
    kinds = {b.slot: b.kind for b in buffers}
    assert all(kinds[b.slot] == b.kind for b in buffers)
    assert len(set(buffers)) == len(buffers)
    wanted = peak(before, lambda v: "token" if v.ty.shape.values[0].same_as(graph.tiles) else "sequence")
    assert {kind: list(kinds.values()).count(kind) for kind in wanted} == wanted


EXAMPLES = {
    "chain": ([("mix", 0, 0, c) for c in (2, 6, 0, 6, 2)], [0]),
    "two outputs, one made early": ([("mix", 0, 1, 6) for _ in range(5)], [0, 4]),
    "view that outlives its source's last reader": ([("view", 0, 0, 2), ("mix", 1, 1, 6), ("view", 1, 0, 6)], [0, 1]),
    "tokens and sequences": (
        [("mix", 0, 0, 2), ("pool", 0, 0, 6), ("mix", 0, 0, 2), ("pool", 1, 0, 2), ("mix", 0, 1, 0)],
        [0, 2],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_planned_and_unplanned_code_compute_the_same(name):
    steps, outputs = EXAMPLES[name]
    before = lowered(Graph().build(steps, outputs))
    after, buffers = plan_memory(before)
    specs = [BufferSpec(b.name, b.slot, b.kind, b.columns, b.dtype) for b in buffers]
    memory = Buffers(specs, ROW_TILE)
    plain, planned = executable(before), executable(after)
    rng = np.random.default_rng(0)
    for tiles, sequences in ((3, 2), (7, 9)):  # 1 and 3 tiles of sequences
        x = tvm.runtime.tensor(rng.standard_normal((tiles, ROW_TILE)).astype("float32"))
        bounds = tvm.runtime.tensor(np.zeros(sequences + 1, "int32"))
        wanted = plain["main"](x, bounds)
        got = planned["main"](x, bounds, *memory.tensors(tiles, -(-sequences // ROW_TILE)))
        for w, g in zip(*([r] if isinstance(r, tvm.runtime.Tensor) else list(r) for r in (wanted, got)), strict=True):
            np.testing.assert_array_equal(g.numpy(), w.numpy())


def plan(steps: list[Step], outputs: list[int] | None = None, first_columns: int = 6) -> tuple[Buffer, ...]:
    return plan_memory(lowered(Graph(first_columns).build(steps, outputs or [0])))[1]


def test_a_chain_needs_two_slots():
    buffers = plan([("mix", 0, 0, 6)] * 7)
    assert sorted({b.slot for b in buffers}) == [0, 1]


def test_an_output_made_early_keeps_its_slot():
    buffers = plan([("mix", 0, 0, 6)] * 7, [0, 7])
    assert len({b.slot for b in buffers}) == 3


def test_an_output_that_is_bound_early_keeps_its_slot():
    mod = lowered(Graph().build([("mix", 0, 0, 6)] * 7, [0]))
    main = mod["main"]
    early = next(var for _, var, value in bindings(mod) if is_allocation(value))
    mod["main"] = relax.Function(main.params, relax.SeqExpr(main.body.blocks, early), early.ty, False, main.attrs)
    after, buffers = plan_memory(mod)
    assert Memory(after, buffers).outputs == Memory(mod).outputs


def test_the_narrowest_free_slot_that_is_wide_enough_is_taken():
    # Slots 0 (6 wide) and 1 (2 wide) are free when the last tensor, 2 wide, is allocated.
    buffers = plan([("mix", 0, 0, 2), ("mix", 0, 1, 6), ("mix", 0, 0, 2)])
    assert [(b.slot, b.columns) for b in buffers] == [(0, 6), (1, 2), (2, 6)]


def test_a_free_slot_is_widened_before_a_new_one_is_made():
    buffers = plan([("mix", 0, 0, 2), ("mix", 0, 0, 6)], first_columns=2)
    assert [(b.slot, b.columns) for b in buffers] == [(0, 2), (1, 2), (0, 6)]


def test_tensors_of_one_slot_and_width_are_one_parameter():
    mod = lowered(Graph().build([("mix", 0, 0, 6)] * 6, [0]))
    after, buffers = plan_memory(mod)
    assert [p.name for p in after["main"].params] == ["x", "cu_seqlens", "buffer_0_6_float32", "buffer_1_6_float32"]
    assert [b.name for b in buffers] == ["buffer_0_6_float32", "buffer_1_6_float32"]


@pytest.mark.parametrize(
    "shape",
    [
        lambda g: (g.tiles, 8, 2),
        lambda g: (g.tiles * 2, ROW_TILE, 2),
        lambda g: (5, ROW_TILE, 2),
        lambda g: (g.tiles, ROW_TILE, 2, 2),
        lambda g: (g.tiles, ROW_TILE, g.tiles),
        lambda g: (g.tiles,),
    ],
    ids=["other row tile", "twice the tiles", "constant", "rank 4", "symbolic columns", "rank 1"],
)
def test_tensors_of_any_other_shape_are_left_to_tvm(shape):
    graph = Graph()
    with graph.builder.function("main", [graph.x, graph.cu_seqlens], attrs={"num_input": 2}):
        with graph.builder.dataflow():
            out = graph.builder.emit_output(relax.op.zeros(shape(graph), "float32"))
        graph.builder.emit_func_output(out)
    before = lowered(graph.builder.finalize())
    after, buffers = plan_memory(before)
    assert buffers == ()
    assert sum(is_allocation(value) for _, _, value in bindings(after)) == 1


def test_a_model_that_keeps_nothing_needs_no_buffers():
    graph = Graph()
    with graph.builder.function("main", [graph.x, graph.cu_seqlens], attrs={"num_input": 2}):
        with graph.builder.dataflow():
            out = graph.builder.emit_output(graph.x)
        graph.builder.emit_func_output(out)
    assert plan_memory(lowered(graph.builder.finalize()))[1] == ()
