"""Kinds of failure, with their status and their form in each protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from turbo_tvm.errors import DeadlineError, EngineError, InputError, MemoryBudgetError, OverloadError, TurboError

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Kind:
    """A kind of failure."""

    status: int  # of HTTP
    grpc: str  # the name of gRPC's status
    openai: str  # the `type` of OpenAI's error
    tei: str  # the `error_type` of text-embeddings-inference's error
    outcome: str  # as the metrics count it


INVALID = Kind(400, "INVALID_ARGUMENT", "invalid_request_error", "Validation", "invalid")
UNAUTHORIZED = Kind(401, "UNAUTHENTICATED", "authentication_error", "Unauthorized", "invalid")
NOT_FOUND = Kind(404, "NOT_FOUND", "not_found_error", "NotFound", "invalid")
NOT_ALLOWED = Kind(405, "UNIMPLEMENTED", "invalid_request_error", "Validation", "invalid")
SLOW_BODY = Kind(408, "CANCELLED", "invalid_request_error", "Validation", "invalid")
TOO_LARGE = Kind(413, "RESOURCE_EXHAUSTED", "invalid_request_error", "Validation", "invalid")
UNSUPPORTED = Kind(415, "INVALID_ARGUMENT", "invalid_request_error", "Validation", "invalid")
UNPROCESSABLE = Kind(422, "INVALID_ARGUMENT", "invalid_request_error", "Validation", "invalid")
FAILED = Kind(424, "INTERNAL", "server_error", "Backend", "failed")
OVERLOADED = Kind(429, "RESOURCE_EXHAUSTED", "rate_limit_error", "Overloaded", "rejected")
INTERNAL = Kind(500, "INTERNAL", "server_error", "Backend", "failed")
UNAVAILABLE = Kind(503, "UNAVAILABLE", "server_error", "Unhealthy", "rejected")
TIMED_OUT = Kind(504, "DEADLINE_EXCEEDED", "server_error", "Overloaded", "timed_out")


class Problem(TurboError):
    """The error that a request is answered with. param: the field that is wrong, for protocols that name it."""

    def __init__(self, kind: Kind, message: str, *, param: str | None = None):
        super().__init__(message)
        self.kind, self.param = kind, param


class Disconnected(Exception):
    """The client hung up: there is nobody to answer."""


def problem_of(error: BaseException) -> Problem:
    """Return the Problem to answer with for an error of the engine, model or tokenizer; INTERNAL for any other."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, TurboError):
        return Problem(_kind_of(error), str(error))
    return Problem(INTERNAL, f"the server failed: {type(error).__name__}")  # details are in its log


def _kind_of(error: TurboError) -> Kind:
    for raised, kind in (
        (OverloadError, OVERLOADED),
        (DeadlineError, TIMED_OUT),
        (EngineError, UNAVAILABLE),
        (MemoryBudgetError, TOO_LARGE),
        (InputError, INVALID),
    ):
        if isinstance(error, raised):
            return kind
    return FAILED


def kserve_form(problem: Problem) -> dict[str, Any]:
    """Return the body of an error in the Open Inference Protocol."""
    return {"error": str(problem)}


def openai_form(problem: Problem) -> dict[str, Any]:
    """Return the body of an error in OpenAI's protocol."""
    kind = problem.kind
    return {"error": {"message": str(problem), "type": kind.openai, "param": problem.param, "code": kind.status}}


def tei_form(problem: Problem) -> dict[str, Any]:
    """Return the body of an error in text-embeddings-inference's protocol."""
    return {"error": str(problem), "error_type": problem.kind.tei}


Form = Callable[[Problem], dict[str, Any]]
