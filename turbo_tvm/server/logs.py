"""The server's log: a line per event on stderr, for people, or in JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

_ROOT = "turbo_tvm"


def configure(as_json: bool) -> None:
    """Send the logs of the server, its engines and uvicorn to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if as_json else Plain())
    for name in (_ROOT, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


class Plain(logging.Formatter):
    """Formats a record for people: `time level message name=value ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and the traceback if the record has one."""
        more = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower():7} {_printable(record.getMessage())}{more}"
        return line + (f"\n{_traceback(record)}" if record.exc_info else "")


class Json(logging.Formatter):
    """Formats a record as a JSON object: time, level, logger, message, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        plain = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        plain |= {"message": record.getMessage(), **_fields(record)}
        if record.exc_info:
            plain["traceback"] = _traceback(record)
        return json.dumps(plain, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


def _traceback(record: logging.LogRecord) -> str:
    assert record.exc_info
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()


def _printable(text: str) -> str:
    """Escape what does not print, so that the path of a request cannot write lines of its own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
