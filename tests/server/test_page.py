"""The live page in headless Chromium: it draws what happened, and answers a text that is typed into it."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import pytest

pytestmark = pytest.mark.xdist_group("server")

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=4000", "--dump-dom"),
]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page(real, tmp_path):
    for text in ("the cat", "a dog ran in the park", "red"):
        assert httpx.post(f"{real.url}/embed", json={"inputs": text}).status_code == 200
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", f"{real.url}/#try"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    page = done.stdout
    assert '<option value="embedder">' in page and '<option value="reranker">' in page
    assert 'id="status" role="status" class="">live<' in page or ">live</span>" in page, page[:2000]
    assert "requests / s" in page and "memory arena" in page
    assert page.count('class="batch"') >= 1 and "tokens" in page
    assert "32 numbers" in page and "cosine similarity to the first" in page
