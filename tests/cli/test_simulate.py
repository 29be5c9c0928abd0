"""`turbo-tvm simulate`."""

from __future__ import annotations

import json

import pytest
from cli_runner import fail, succeed

from turbo_tvm.cli import simulate
from turbo_tvm.cli.simulation_plot import draw
from turbo_tvm.runtime.scheduling.scheduler import POLICIES


def test_simulated_tables(priced):
    text = succeed("simulate", priced, "--threads", "1", "--lengths", "2..30", "--requests", "300")
    for words in ("Simulated, 1 replica", "nobatch", "naive", "dp", "p99", "bounded"):
        assert words in text
    assert text.count("nobatch") == 9


def test_simulated_json(priced):
    options = ["--threads", "1", "--requests", "500", "--policy", "dp", "--rates", "100,400", "--replicas", "3"]
    options += ["--lengths", "2..30"]
    found = json.loads(succeed("simulate", priced, *options, "--timeout", "0.05", "--arrivals", "bursty", "--json"))
    assert [r["policy"] for r in found] == ["dp", "dp"]
    assert found[0]["rate"] < found[1]["rate"] and 0 < found[0]["in_time"] <= 1
    assert 0 < found[0]["p50_s"] <= found[0]["p95_s"] <= found[0]["p99_s"]


def test_a_trace_of_real_arrivals(priced, tmp_path):
    trace = tmp_path / "real.csv"
    trace.write_text("arrival_s,length\n" + "".join(f"{i / 100},{i % 30 + 1}\n" for i in range(200)))
    found = json.loads(succeed("simulate", priced, "--machine", "another", "--trace", trace, "--json"))
    assert {r["policy"] for r in found} == {"nobatch", "naive", "dp"}
    assert found[0]["rate"] == pytest.approx(100.0)
    assert "Simulated, 2 replicas" in succeed(
        "simulate",
        priced,
        "--machine",
        "another",
        "--trace",
        trace,
        "--rates",
        "50",
        "--replicas",
        "2",
        "--trigger",
        "lazy",
    )


def test_the_picture(priced, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "load.svg"
    options = ["--threads", "1", "--lengths", "7", "--requests", "50", "--rates", "100,200"]
    succeed("simulate", priced, *options, "--plot", path)
    assert "requests/s" in path.read_text() and path.stat().st_size > 5000
    assert callable(draw)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "9..2"], "no range of lengths"),
        (["--lengths", "a..b"], "no range of lengths"),
        (["--lengths", "2.."], "no range of lengths"),
        (["--rates", "10,x"], "no list of requests per second"),
        (["--rates", "-1"], "no list of requests per second"),
        (["--policy", "best"], "not one of"),
        (["--plot", "load.pdf"], "must end in .png or .svg"),
    ],
)
def test_options_that_are_wrong(priced, options, message):
    assert message in fail("simulate", priced, *options, code=2)


def test_no_cost_for_this_machine(tiny_artifact, priced):
    text = fail("simulate", tiny_artifact, "--threads", "1")
    assert "it has: none" in text and "turbo-tvm cost" in text
    assert "another" in fail("simulate", priced, "--machine", "a third")


def test_sequences_that_the_model_does_not_take(priced, tmp_path):
    assert "up to 40 tokens, and 100 are asked for" in fail("simulate", priced, "--threads", "1")
    trace = tmp_path / "one.csv"
    trace.write_text("arrival_s,length\n1,3\n")
    assert "has no rate to change" in fail("simulate", priced, "--threads", "1", "--trace", trace)


def test_no_file(tmp_path):
    for command in ("cost", "simulate"):
        assert "cannot be read" in fail(command, tmp_path / "none.turbo")


def test_every_policy_can_be_chosen():
    assert set(simulate._POLICIES) == set(POLICIES)
