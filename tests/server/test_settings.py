"""Settings travel to workers and back; logs are one line per event."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from turbo_tvm.server.logs import Json, Plain
from turbo_tvm.server.settings import Settings


def test_there_and_back():
    settings = Settings(
        files=(Path("a.turbo"), Path("b.turbo")),
        grpc_port=1,
        max_tokens=5,
        api_keys=("k",),
        cors_origins=("*",),
        tls_cert=Path("c.pem"),
        models_dir=Path("m"),
    )
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(Settings(files=()).to_json()) == Settings(files=())


def record(message, **fields):
    made = logging.LogRecord("turbo_tvm.server", logging.INFO, "", 0, message, (), None)
    made.fields = fields
    return made


def test_a_line_per_event():
    one = record("GET /a\nb\x1b[31m", id="7", status=200)
    line = Plain().format(one)
    assert "\n" not in line and "\x1b" not in line and line.endswith("id=7 status=200")
    plain = json.loads(Json().format(one))
    assert (plain["message"], plain["id"], plain["status"]) == ("GET /a\nb\x1b[31m", "7", 200)
    assert plain["time"].endswith("+00:00")
