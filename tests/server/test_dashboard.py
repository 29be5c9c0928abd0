"""What the dashboard is told is what happened."""

from __future__ import annotations

import httpx
import pytest
from running_server import running

from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord
from turbo_tvm.server.dashboard import BATCHES, Dashboard

pytestmark = pytest.mark.xdist_group("server")


def test_the_page_s_state(fake):
    with running({"fake": fake}) as server:
        for ids in ([1, 2, 3], [[4, 5], [6]]):
            httpx.post(f"{server.url}/embed", json={"inputs": ids})
        (model,) = httpx.get(f"{server.url}/dashboard/state").json()["models"]
        page = httpx.get(server.url).text
        for name in ("page.js", "page.css"):
            assert f"page/{name}" in page and httpx.get(f"{server.url}/page/{name}").status_code == 200
    assert (model["name"], model["kind"], model["answered"], model["waiting"]) == ("fake", "embedding", 3, 0)
    lengths = sorted(n for batch in model["batches"] for n in batch["lengths"])
    assert lengths == [1, 2, 3] and sum(second[1] for second in model["seconds"]) == 3
    assert model["latency_s"]["50"] <= model["latency_s"]["99"]


def test_the_state_is_bounded():
    dashboard = Dashboard()
    for i in range(500):
        dashboard.batch(BatchRecord((i + 1,), i + 4, 0.01, 0.01, (0.02,)))
    state = dashboard.state()
    assert len(state["batches"]) == BATCHES and state["batches"][-1]["lengths"] == (500,)
    assert sum(second[1] for second in state["seconds"]) == 500
    assert state["latency_s"]["99"] == pytest.approx(0.03)


def test_nothing_yet():
    assert Dashboard().state()["latency_s"] == {"50": None, "95": None, "99": None}
