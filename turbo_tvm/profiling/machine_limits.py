"""Limits of this machine's speed, measured once by small kernels and kept in the user's cache.

Importing this module, and reading limits from the cache, needs no TVM; measuring needs TVM with its compiler.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from turbo_tvm import config
from turbo_tvm.runtime.device.cpu_features import cpu_name

if TYPE_CHECKING:
    from turbo_tvm.profiling.roofline import MachineLimits

_LEAST_SHARE = 0.95  # the part of the time that the threads must have run, or the limits are not kept
_MAY_BE_NONE = ("bf16_flops", "cache")
_FORMAT = 2  # raised when a figure comes to mean something else; 2: bf16_flops are AMX's where the CPU has it

Say = Callable[[str], None]


def machine_limits(threads: int, *, remeasure: bool = False, notice: Say = print, step: Say = print) -> MachineLimits:
    """Return the limits with this many threads: from the cache, else measured in about two seconds and kept.

    notice: called with a line when the cache cannot be used. step: called with what is being measured.

    Raises CompileError where nothing is in the cache and this process has no compiler.
    """
    found = None if remeasure else cached(threads, notice)
    if found is None:
        from turbo_tvm.profiling.limit_measurement import measure

        config.check_tvm_can_compile()
        found = measure(threads, cpu_name(), tvm_version(), step=step)
        if found.cpu_share < _LEAST_SHARE:
            notice(f"other programs took {1 - found.cpu_share:.0%} of the CPUs: the limits are too low, and not kept")
        else:
            _keep(found, notice)
    return found


def cached(threads: int, notice: Say = print) -> MachineLimits | None:
    """Return the limits in the cache, or None; `notice` is called with a line on a file that cannot be used."""
    path = cache_file(threads)
    if path is None or not path.is_file():
        return None
    try:
        return _checked(json.loads(path.read_bytes()), threads)
    except (OSError, ValueError) as error:
        notice(f"the measured limits in {path} cannot be used ({error}): measuring again")
        return None


def cache_file(threads: int) -> Path | None:
    """Return the file for the limits of this CPU, thread count and TVM version; None without a cache directory.

    Another format has another file, so that versions of this package side by side do not measure in turns.
    """
    directory = config.cache_directory()
    key = hashlib.sha256("\n".join((str(_FORMAT), cpu_name(), str(threads), tvm_version())).encode()).hexdigest()
    return directory / f"machine-limits-{key[:16]}.json" if directory else None


def tvm_version() -> str:
    """Return TVM's version, without importing it."""
    return metadata.version("apache-tvm")


def _checked(plain: object, threads: int) -> MachineLimits:
    """Make limits from decoded JSON. Raises ValueError unless they are complete, positive, and of this machine."""
    from turbo_tvm.profiling.roofline import MachineLimits

    names = {item.name for item in dataclasses.fields(MachineLimits)}
    if not isinstance(plain, dict) or plain.keys() != names:
        raise ValueError("it does not hold the fields of this version")
    for name, value in plain.items():
        if name in ("cpu", "tvm_version") or (value is None and name in _MAY_BE_NONE):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and name != "cache_bytes"):
            raise ValueError(f"{name} is {value!r}")
    limits = MachineLimits(**plain)
    if (limits.cpu, limits.threads, limits.tvm_version) != (cpu_name(), threads, tvm_version()):
        raise ValueError("it was measured on another machine")
    return limits


def _keep(limits: MachineLimits, notice: Say) -> None:
    """Write the cache file beside and rename it; a cache that cannot be written is no error."""
    path = cache_file(limits.threads)
    if path is None:
        notice("there is no cache directory: the measured limits are not kept")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, delete=False) as file:
            json.dump(dataclasses.asdict(limits), file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        notice(f"the measured limits cannot be kept in {path.parent} ({error.strerror or error})")
