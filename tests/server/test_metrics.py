"""What /metrics says is what happened."""

from __future__ import annotations

import httpx
import pytest
from running_server import running, scraped

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
