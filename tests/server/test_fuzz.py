"""Whatever the document allows, and what it does not: no request brings the server to an error of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.slow]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_fuzzed_from_its_own_document(real, tmp_path):
    program = Path(sys.executable).with_name("schemathesis")
    arguments = ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "40", "--seed", "1"]
    more = ["--suppress-health-check", "all", "--warnings", "off", "--continue-on-failure"]
    done = subprocess.run(
        [program, "run", f"{real.url}/openapi.json", *arguments, *more],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert httpx.post(f"{real.url}/embed", json={"inputs": "the cat"}).status_code == 200
