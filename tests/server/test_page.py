"""The dashboard: its HTML and JS fit together, its JS draws a server's state, and a browser shows all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from running_server import FakeEmbedder, running

from turbo_tvm.server.dashboard import SECONDS
from turbo_tvm.server.operations import PAGE

pytestmark = pytest.mark.xdist_group("server")

JS, HTML, CSS = ((PAGE / name).read_text() for name in ("page.js", "index.html", "page.css"))
HARNESS = Path(__file__).with_name("page_harness.js")
NODE = shutil.which("node")
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


class Parsed(HTMLParser):
    """The page's tags: (name, attributes), and whether all that were opened are closed in order."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


@pytest.fixture(scope="module")
def html() -> Parsed:
    return Parsed(HTML)


class TestStructure:
    def test_the_html_is_well_formed(self, html):
        assert html.open == [] and html.tags[0][0] == "html"
        ids = html.values("id")
        assert len(ids) == len(set(ids))

    def test_every_element_that_the_script_uses_is_there(self, html):
        used = set(re.findall(r'\$\("([^"]+)"\)', JS))
        assert used == set(html.values("id")), "each id is used, and each that is used exists"

    def test_every_file_and_link_exists(self, html, fake):
        links = [link for name in ("src", "href") for link in html.values(name) if not link.startswith("data:")]
        assert {"page/page.js", "page/page.css", "openapi.json", "metrics"} <= set(links)
        with running({"fake": fake}) as server:
            assert all(httpx.get(f"{server.url}/{link}").status_code == 200 for link in links)

    def test_every_class_has_a_style(self, html):
        set_by_script = re.findall(r'className = "([^"]+)"', JS) + re.findall(r'classList\.toggle\("([^"]+)"', JS)
        for name in {*html.values("class"), *set_by_script}:
            assert re.search(rf"\.{name}\b", CSS), name


@pytest.fixture(scope="module")
def state() -> dict:
    """What the page fetches, from a server that answered two requests."""
    with running({"fake": FakeEmbedder()}) as server:
        for ids in ([1, 2, 3], [[4, 5], [6]]):
            assert httpx.post(f"{server.url}/embed", json={"inputs": ids}).status_code == 200
        return httpx.get(f"{server.url}/dashboard/state").json()


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
class TestScript:
    """page.js in Node.js, with the state of a server and elements that keep what is drawn into them."""

    def run(self, state, status=200, answer=(200, [[0.6, 0.8], [1.0, 0.0]])) -> dict:
        replies = {"dashboard/state": [status, state], "models/fake/embed": answer}
        done = subprocess.run(
            [NODE, HARNESS, PAGE / "page.js"], input=json.dumps(replies), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def test_it_draws_the_state(self, state):
        page = self.run(state)
        drawn = page["started"]
        assert drawn["status"]["textContent"] == "live" and drawn["status"]["classes"] == []
        assert [option["value"] for option in drawn["model"]["children"]] == ["fake"]
        numbers = {
            box["children"][1]["textContent"]: box["children"][0]["textContent"] for box in drawn["numbers"]["children"]
        }
        assert numbers["answered"] == "3" and numbers["waiting"] == "0 of 1024" and numbers["refused"] == "0"
        assert numbers["memory arena"] == "0.0 MiB" and numbers["p50"].endswith(" ms")
        path, label = drawn["throughput"]["children"]
        assert path["attributes"]["d"].count("L") == SECONDS - 1 and label["textContent"].endswith(" requests / s")
        assert page["intervals"] == [1000]

    def test_it_draws_every_batch(self, state):
        batches = self.run(state)["started"]["batches"]["children"]
        wanted = state["models"][0]["batches"][::-1]  # the newest at the left
        assert [box["title"] for box in batches] == [f"lengths: {', '.join(map(str, b['lengths']))}" for b in wanted]
        for box, batch in zip(batches, wanted, strict=True):
            assert box["className"] == "batch" and len(box["children"]) == 2 + len(batch["lengths"])
            assert box["children"][1]["textContent"] == f"{sum(batch['lengths'])} tokens, {batch['rows']} rows"

    def test_it_sends_texts_with_the_key_and_shows_the_answer(self, state):
        page = self.run(state)
        request = page["requests"][-1]
        assert (request["url"], request["method"]) == ("models/fake/embed", "POST")
        assert json.loads(request["body"]) == {"inputs": ["a cat", "a dog"]}
        assert all(one["headers"]["authorization"] == "Bearer secret" for one in page["requests"])
        shown = page["sent"]["answer"]["textContent"]
        assert "a cat\n  2 numbers: 0.6000, 0.8000, ..." in shown
        assert "cosine similarity to the first:\n  0.6000  a dog" in shown
        assert page["sent"]["took"]["textContent"].endswith(" ms")
        assert page["described"] == ["[\n [\n  1\n ]\n]"] * 2

    def test_it_shows_errors(self, state):
        page = self.run(state, answer=(422, {"error": "inputs is empty"}))
        assert page["sent"]["answer"]["textContent"] == "inputs is empty" and page["sent"]["answer"]["classes"] == [
            "bad"
        ]
        page = self.run({"error": "a key is needed"}, status=401)
        assert page["started"]["status"]["textContent"] == "a key is needed"
        assert page["started"]["status"]["classes"] == ["bad"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(real, tmp_path):
    for text in ("the cat", "a dog ran in the park", "red"):
        assert httpx.post(f"{real.url}/embed", json={"inputs": text}).status_code == 200
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", f"{real.url}/#try"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    page = done.stdout
    assert '<option value="embedder">' in page and '<option value="reranker">' in page
    assert 'id="status" role="status" class="">live<' in page or ">live</span>" in page, page[:2000]
    assert "requests / s" in page and "memory arena" in page
    assert page.count('class="batch"') >= 1 and "tokens" in page
    assert "32 numbers" in page and "cosine similarity to the first" in page
