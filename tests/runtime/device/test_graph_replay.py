"""When a batch is replayed as a graph."""

from __future__ import annotations

from turbo_tvm.runtime.device.graph_replay import KEPT_GRAPHS, GraphReplay


class Place:
    """A tensor, as far as this is concerned."""

    def __init__(self, *shape, at=0):
        self.shape, self.at = shape, at

    def data_ptr(self):
        return self.at


class Machine:
    """Functions of a virtual machine that say what was called."""

    def __init__(self):
        self.calls, self.forgotten = [], 0
        self.replay = GraphReplay(self.plain, self.captured, self.forget)

    def plain(self, *tensors):
        self.calls.append("plain")
        return f"results {len(self.calls)}"

    def captured(self, *tensors):
        self.calls.append("captured")

    def forget(self):
        self.forgotten += 1
        self.replay.renew(self.plain, self.captured)

    def run(self, *shape, at=0):
        return self.replay([Place(*shape)], [], [Place(1, at=at)])


def test_from_the_second_time_on():
    machine = Machine()
    assert [machine.run(3), machine.run(3), machine.run(4), machine.run(3)] == ["results 1"] * 2 + [
        "results 3",
        "results 1",
    ]
    assert machine.calls == ["plain", "captured", "plain", "captured"]


def test_what_moved_is_run_anew_and_all_graphs_go():
    machine = Machine()
    machine.run(3), machine.run(3), machine.run(5)
    machine.run(3, at=64)
    assert machine.forgotten == 1 and machine.calls[-1] == "plain"
    machine.run(3, at=64), machine.run(5, at=64)
    assert machine.calls[-2:] == ["captured", "plain"]


def test_graphs_do_not_pile_up():
    machine = Machine()
    for n in range(1, 3 * KEPT_GRAPHS):
        machine.run(n)
    assert machine.forgotten == 2 and len(machine.replay._seen) <= KEPT_GRAPHS
