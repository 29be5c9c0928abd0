"""Logs are one line per event."""

from __future__ import annotations

import json
import logging

from turbo_tvm.server.logs import Json, Plain


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
