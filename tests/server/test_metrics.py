"""What /metrics and the live page say is what happened."""

from __future__ import annotations

import httpx
import pytest
from running_server import running, scraped

from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord
from turbo_tvm.server.live import BATCHES, Live

pytestmark = pytest.mark.xdist_group("server")


def test_metrics(fake):
    with running({"fake": fake}) as server:
        for ids in ([1, 2, 3], [4, 5], [1, 2, 3]):
            assert httpx.post(f"{server.url}/embed", json={"inputs": ids}).status_code == 200
        httpx.post(f"{server.url}/embed", json={"inputs": {}})
        found = scraped(server.url)

    def of(name, **labels):
        return found[(name, *sorted(labels.items()))]

    assert of("turbo_requests_total", protocol="tei", outcome="answered") == 3
    assert of("turbo_requests_total", protocol="tei", outcome="invalid") == 1
    assert of("turbo_request_seconds_count", protocol="tei") == 4
    for name, value in {
        "turbo_queue_seconds_count": 2,
        "turbo_execution_seconds_count": 2,
        "turbo_batch_tokens_sum": 5,
        "turbo_batch_sequences_sum": 2,
        "turbo_rows_total": 8,
        "turbo_padding_rows_total": 3,
        "turbo_cost_error_ratio_count": 2,
        "turbo_cache_hits_total": 1,
        "turbo_cache_misses_total": 2,
        "turbo_arena_bytes": 12345,
        "turbo_queue_size": 0,
    }.items():
        assert of(name, model="fake") == value, name
    assert not any(key[0].endswith("_created") for key in found)


def test_the_page_s_state(fake):
    with running({"fake": fake}) as server:
        for ids in ([1, 2, 3], [[4, 5], [6]]):
            httpx.post(f"{server.url}/embed", json={"inputs": ids})
        (model,) = httpx.get(f"{server.url}/live").json()["models"]
        page = httpx.get(server.url).text
        for name in ("page.js", "page.css"):
            assert f"page/{name}" in page and httpx.get(f"{server.url}/page/{name}").status_code == 200
    assert (model["name"], model["kind"], model["answered"], model["waiting"]) == ("fake", "embedding", 3, 0)
    lengths = sorted(n for batch in model["batches"] for n in batch["lengths"])
    assert lengths == [1, 2, 3] and sum(second[1] for second in model["seconds"]) == 3
    assert model["latency_s"]["50"] <= model["latency_s"]["99"]


def test_the_live_state_is_bounded():
    live = Live()
    for i in range(500):
        live.batch(BatchRecord((i + 1,), i + 4, 0.01, 0.01, (0.02,)))
    state = live.state()
    assert len(state["batches"]) == BATCHES and state["batches"][-1]["lengths"] == (500,)
    assert sum(second[1] for second in state["seconds"]) == 500
    assert state["latency_s"]["99"] == pytest.approx(0.03)


def test_nothing_yet():
    assert Live().state()["latency_s"] == {"50": None, "95": None, "99": None}
