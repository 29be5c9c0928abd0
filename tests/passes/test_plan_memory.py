"""The memory plan: random straight-line graphs are planned, checked, and run beside what TVM allocates itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import get_args

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te, tirx

from turbo_tvm.artifact.manifest import BufferSpec, Dtype
from turbo_tvm.ops.operator import OVERWRITES
from turbo_tvm.passes.plan_memory import DTYPES, Buffer, MemoryPlan, plan_memory
from turbo_tvm.passes.remove_padding import sequence_tiles
from turbo_tvm.runtime.memory.buffers import Buffers
from turbo_tvm.runtime.memory.planner import plan as place
from turbo_tvm.runtime.memory.table import MemoryTable

ROW_TILE = 4
COLUMNS = (0, 2, 6)  # 0: rank 2


def rows(count, columns: int) -> tuple:
    return (count, ROW_TILE, columns) if columns else (count, ROW_TILE)


@cache
def kernel(op: str, a_columns: int, b_columns: int, columns: int) -> tirx.PrimFunc:
    """A trivial kernel: `mix` adds two tensors of rows, `pool` makes rows of the first tile, `flat` reads a view.

    What `mix` reads element by element, it may overwrite.
    """
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
    alike = [i for i, width in enumerate((a_columns, b_columns)) if op == "mix" and width == columns]
    return func.without_attr("global_symbol").with_attr("tirx.noalias", True).with_attr(OVERWRITES, alike)


Step = tuple[str, int, int, int]  # operator, operands (counted from the latest value), columns


class Graph:
    """A model that makes tensors of packed rows by trivial kernels; `values` are those made so far."""

    def __init__(self, first_columns: int = 6):
        self.tiles, boundaries = tirx.Var("tiles", "int64"), tirx.Var("boundaries", "int64")
        self.sequences = sequence_tiles(boundaries, ROW_TILE)
        self.symbols = {"token_tiles": self.tiles, "sequence_tiles": self.sequences}
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


SYMBOLS = {"token_tiles": 3, "sequence_tiles": 2}


def overlaps(buffers: tuple[Buffer, ...], in_place: bool) -> list[set[int]]:
    """Which buffers each of them shares bytes with, in the runtime's plan for a batch."""
    table = MemoryTable([BufferSpec(**vars(b)) for b in buffers], in_place)
    sizes = table.sizes(SYMBOLS)
    spans = [(p.offset, p.offset + size) for p, size in zip(place(table.records, sizes).places, sizes, strict=True)]
    mine = [spans[number] for number in table.places]
    return [{j for j, (c, d) in enumerate(mine) if c < b and a < d} for a, b in mine]


class Memory:
    """Runs a lowered `main` on names in place of numbers: every tensor holds the expression that it was given.

    Whoever writes a buffer spoils all others that share bytes with it, so whoever reads one of them gets another name.
    """

    def __init__(self, mod: tvm.IRModule, buffers: tuple[Buffer, ...] = (), in_place: bool = True):
        params = list(mod["main"].params)
        planned = params[len(params) - len(buffers) :]
        self.spoils = {
            p: [planned[j] for j in others if planned[j] is not p]
            for p, others in zip(planned, overlaps(buffers, in_place), strict=True)
        }
        self.held: dict = {p: p.name for p in params}
        self.same_as: dict[relax.Var, list[relax.Var]] = {}
        for _, var, value in bindings(mod):
            self._run(var, value)
        self.outputs = self.read(mod["main"].body.body)

    def _run(self, var: relax.Var, value: relax.Expr) -> None:
        if is_allocation(value):
            self.held[var] = "nothing"
        elif is_kernel(value):
            *arguments, out = value.args
            name = f"{value.op.name_hint}({', '.join(str(self.read(a)) for a in arguments)})"
            out = self._source(out)
            self.held |= dict.fromkeys(self.spoils.get(out, []), f"spoilt by {name}")
            self.held[out] = str(hash(name))
        else:
            views = value.fields if isinstance(value, relax.Tuple) else [value]
            self.same_as[var] = [v.args[0] if isinstance(v, relax.Call) else v for v in views]

    def _source(self, var: relax.Var) -> relax.Var:
        while var in self.same_as:
            (var,) = self.same_as[var]
        return var

    def read(self, var: relax.Expr):
        fields = self.same_as.get(var, [])
        if len(fields) > 1:
            return tuple(self.read(f) for f in fields)
        return self.held[self._source(var)]


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
    graph = Graph()
    before = lowered(graph.build(steps, outputs))
    after, planned = plan_memory(before, "main", graph.symbols)
    for in_place in (True, False):
        assert Memory(after, planned.buffers, in_place).outputs == Memory(before).outputs
    assert not any(is_allocation(value) for _, _, value in bindings(after))


@settings(max_examples=50, deadline=None)
@given(steps, outputs)
def test_lifetimes_are_within_the_steps_and_outputs_live_to_the_end(steps, outputs):
    graph = Graph()
    before = lowered(graph.build(steps, outputs))
    after, planned = plan_memory(before, "main", graph.symbols)
    assert list(planned.steps) == [value.op.name_hint for _, _, value in bindings(before) if is_kernel(value)]
    assert all(0 <= b.first <= b.last <= len(planned.steps) for b in planned.buffers)
    assert sum(b.last == len(planned.steps) for b in planned.buffers) == len({i % (len(steps) + 1) for i in outputs})
    names = [p.name for p in after["main"].params]
    assert names[len(names) - len(planned.buffers) :] == [b.name for b in planned.buffers]


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
    graph = Graph()
    before = lowered(graph.build(steps, outputs))
    after, planned = plan_memory(before, "main", graph.symbols)
    memory = Buffers([BufferSpec(**vars(b)) for b in planned.buffers])
    plain, on_buffers = executable(before), executable(after)
    rng = np.random.default_rng(0)
    for tiles, sequences in ((3, 2), (7, 9)):  # 1 and 3 tiles of sequences
        x = tvm.runtime.tensor(rng.standard_normal((tiles, ROW_TILE)).astype("float32"))
        bounds = tvm.runtime.tensor(np.zeros(sequences + 1, "int32"))
        wanted = plain["main"](x, bounds)
        batch = {"token_tiles": tiles, "sequence_tiles": -(-sequences // ROW_TILE)}
        got = on_buffers["main"](x, bounds, *memory.tensors(batch))
        for w, g in zip(*([r] if isinstance(r, tvm.runtime.Tensor) else list(r) for r in (wanted, got)), strict=True):
            np.testing.assert_array_equal(g.numpy(), w.numpy())


def plan(steps: list[Step], outputs: list[int] | None = None, first_columns: int = 6) -> MemoryPlan:
    graph = Graph(first_columns)
    return plan_memory(lowered(graph.build(steps, outputs or [0])), "main", graph.symbols)[1]


def lives(found: MemoryPlan) -> list[tuple[int, int]]:
    return [(b.first, b.last) for b in found.buffers]


def test_a_tensor_lives_from_its_writer_to_its_last_reader():
    assert lives(plan([("mix", 0, 0, 2), ("mix", 0, 1, 0), ("mix", 0, 0, 6)])) == [(0, 2), (1, 2), (2, 3), (3, 4)]


def test_a_view_keeps_its_source_alive():
    found = plan([("view", 0, 0, 2), ("mix", 1, 1, 0), ("mix", 1, 0, 6)])
    assert lives(found)[0] == (0, 2)


def test_an_output_made_early_lives_to_the_end():
    assert lives(plan([("mix", 0, 0, 2), ("mix", 0, 0, 0)], [0, 2])) == [(0, 3), (1, 2), (2, 3)]


def test_an_output_that_is_bound_early_lives_to_the_end():
    graph = Graph()
    mod = lowered(graph.build([("mix", 0, 0, 6)] * 7, [0]))
    main = mod["main"]
    early = next(var for _, var, value in bindings(mod) if is_allocation(value))
    mod["main"] = relax.Function(main.params, relax.SeqExpr(main.body.blocks, early), early.ty, False, main.attrs)
    after, planned = plan_memory(mod, "main", graph.symbols)
    assert Memory(after, planned.buffers).outputs == Memory(mod).outputs


def test_shapes_are_products_of_symbols():
    found = plan([("pool", 0, 0, 2), ("mix", 0, 0, 0)], [0, 2])
    wanted = [("token_tiles", "4", "6"), ("sequence_tiles", "4", "2"), ("sequence_tiles", "4")]
    assert [b.shape for b in found.buffers] == wanted
    assert {b.dtype for b in found.buffers} == {"float32"}


def replaced(found: MemoryPlan) -> list[str | None]:
    return [b.replaces for b in found.buffers]


class TestInPlace:
    def test_a_kernel_may_overwrite_an_input_that_dies(self):
        found = plan([("mix", 0, 0, 6), ("mix", 0, 1, 6), ("mix", 0, 1, 6)])
        assert replaced(found) == [None, None, "buffer_0", "buffer_2"]

    def test_not_one_that_is_read_later(self):
        found = plan([("mix", 0, 0, 2), ("mix", 0, 1, 6), ("mix", 0, 2, 6)])
        assert replaced(found) == [None, None, None, "buffer_2"]

    def test_not_one_that_is_an_output(self):
        assert replaced(plan([("mix", 0, 0, 2), ("mix", 0, 1, 6)], [0, 2])) == [None, None, None]

    def test_not_one_that_the_kernel_reads_in_another_place_too(self):
        assert replaced(plan([("mix", 0, 0, 6)])) == [None, None]

    def test_not_one_of_another_type(self):
        assert replaced(plan([("mix", 0, 0, 2), ("mix", 0, 0, 6)])) == [None, None, None]

    def test_not_where_the_kernel_does_not_say_so(self, monkeypatch):
        monkeypatch.setattr("turbo_tvm.passes.plan_memory.OVERWRITES", "another attribute")
        assert set(replaced(plan([("mix", 0, 0, 6), ("mix", 0, 1, 6), ("mix", 0, 1, 6)]))) == {None}


@pytest.mark.parametrize(
    "shape",
    [
        lambda g: (g.tiles + 1, ROW_TILE, 2),
        lambda g: ((g.tiles + 1) // 2, ROW_TILE, 2),
        lambda g: (),
    ],
    ids=["one more", "half", "scalar"],
)
def test_tensors_of_any_other_shape_are_left_to_tvm(shape):
    graph = Graph()
    with graph.builder.function("main", [graph.x, graph.cu_seqlens], attrs={"num_input": 2}):
        with graph.builder.dataflow():
            out = graph.builder.emit_output(relax.op.zeros(shape(graph), "float32"))
        graph.builder.emit_func_output(out)
    before = lowered(graph.builder.finalize())
    after, planned = plan_memory(before, "main", graph.symbols)
    assert planned.buffers == ()
    assert sum(is_allocation(value) for _, _, value in bindings(after)) == 1


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (lambda g: (g.tiles * 2, 8, 2), ("2*token_tiles", "8", "2")),
        (lambda g: (5, 3), ("5", "3")),
        (lambda g: (g.tiles, 3, g.tiles * g.sequences, 2), ("token_tiles", "3", "sequence_tiles*token_tiles", "2")),
    ],
    ids=["twice the tiles", "constant", "a product of symbols"],
)
def test_tensors_of_any_shape_of_products_are_planned(shape, wanted):
    graph = Graph()
    with graph.builder.function("main", [graph.x, graph.cu_seqlens], attrs={"num_input": 2}):
        with graph.builder.dataflow():
            out = graph.builder.emit_output(relax.op.zeros(shape(graph), "float32"))
        graph.builder.emit_func_output(out)
    after, planned = plan_memory(lowered(graph.builder.finalize()), "main", graph.symbols)
    assert [(b.shape, b.first, b.last) for b in planned.buffers] == [(wanted, 0, 1)]
    assert not any(is_allocation(value) for _, _, value in bindings(after))


def test_a_model_that_keeps_nothing_needs_no_buffers():
    graph = Graph()
    with graph.builder.function("main", [graph.x, graph.cu_seqlens], attrs={"num_input": 2}):
        with graph.builder.dataflow():
            out = graph.builder.emit_output(graph.x)
        graph.builder.emit_func_output(out)
    assert plan_memory(lowered(graph.builder.finalize()), "main", graph.symbols)[1] == MemoryPlan()


def test_types_that_the_runtime_cannot_name_are_left_to_tvm():
    graph = Graph()
    with graph.builder.function("main", [graph.x, graph.cu_seqlens], attrs={"num_input": 2}):
        with graph.builder.dataflow():
            out = graph.builder.emit_output(relax.op.astype(graph.x, "int16"))
        graph.builder.emit_func_output(out)
    assert plan_memory(lowered(graph.builder.finalize()), "main", graph.symbols)[1].buffers == ()


def test_planned_types_are_those_of_the_manifest():
    assert set(DTYPES) == set(get_args(Dtype))
