"""Failures: the kind of every error, and its form in each protocol."""

from __future__ import annotations

import pytest

from turbo_tvm.errors import (
    ArtifactError,
    DeadlineError,
    EngineError,
    InputError,
    MemoryBudgetError,
    OverloadError,
    TurboError,
)
from turbo_tvm.server import errors
from turbo_tvm.server.errors import Problem, kserve_form, openai_form, problem_of, tei_form


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (InputError("a"), errors.INVALID, 400),
        (MemoryBudgetError("a"), errors.TOO_LARGE, 413),
        (ArtifactError("a"), errors.FAILED, 424),
        (TurboError("a"), errors.FAILED, 424),
        (OverloadError("a"), errors.OVERLOADED, 429),
        (EngineError("a"), errors.UNAVAILABLE, 503),
        (DeadlineError("a"), errors.TIMED_OUT, 504),
    ],
)
def test_errors_of_ours_keep_their_message(error, kind, status):
    found = problem_of(error)
    assert (found.kind, found.kind.status, str(found)) == (kind, status, "a")


def test_other_errors_do_not_show_their_message():
    found = problem_of(ValueError("a secret"))
    assert found.kind is errors.INTERNAL and str(found) == "the server failed: ValueError"


def test_a_problem_is_itself_in_every_form():
    one = Problem(errors.NOT_FOUND, "no model", param="model")
    assert problem_of(one) is one
    assert kserve_form(one) == {"error": "no model"}
    assert tei_form(one) == {"error": "no model", "error_type": "NotFound"}
    assert openai_form(one) == {
        "error": {"message": "no model", "type": "not_found_error", "param": "model", "code": 404}
    }


def test_every_kind_has_a_status_of_grpc():
    grpc = pytest.importorskip("grpc")
    kinds = [value for value in vars(errors).values() if isinstance(value, errors.Kind)]
    assert len(kinds) > 10 and all(hasattr(grpc.StatusCode, kind.grpc) for kind in kinds)
