"""The exceptions that turbo_tvm raises: one tree, so that a caller can catch all of it at once.

A message says what was wrong, with the value, and what to do about it.
"""


def summary(error: BaseException) -> str:
    """Return the first line of a library's error that is not blank, to end one of our messages with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class TurboError(Exception):
    """The root of every exception that turbo_tvm raises on purpose."""


class UnsupportedModelError(TurboError):
    """The model cannot be imported or compiled: its type, its dtype or one of its operators is not supported."""


class CompileError(TurboError):
    """Compiling failed for a reason outside the model, such as a missing C compiler."""


class TargetError(TurboError, ValueError):
    """The target's name is unknown, or it does not support what was asked of it."""


class InputError(TurboError, ValueError):
    """A request that the model cannot answer: a token id out of range, an empty or over-long sequence, a bad mask."""


class ArtifactError(TurboError):
    """An artifact cannot be written, or cannot be used here: damaged, of another version, for another CPU."""


class MemoryBudgetError(InputError):
    """A request whose intermediates need more memory than `memory_budget` allows; nothing of it ran."""


class EngineError(TurboError):
    """The engine cannot answer a request: it is closed, overloaded, or stopped by an error of its own."""


class OverloadError(EngineError):
    """The engine's queue is full: the request was refused at once and can be sent again later."""


class DeadlineError(EngineError, TimeoutError):
    """A request was not answered within its time; if it was still waiting, it never ran."""


class TuningError(TurboError):
    """Tuning cannot go on: there is nothing to tune, a tracker does not answer, or no worker stays alive."""


class WrongAnswersError(TuningError):
    """A candidate computes something else than the default kernel; measuring it again would not help."""


class TuningLogError(TuningError):
    """A tuner's log cannot be used: damaged, or not a log; the message names the file and the line."""
