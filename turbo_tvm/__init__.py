"""turbo_tvm: compile transformer encoders with Apache TVM and serve ragged requests without padding.

import turbo_tvm

fast = turbo_tvm.compile(model)                  # a torch.nn.Module or a model folder
vectors = fast.run([ids_a, ids_b, ids_c])        # any lengths, no padding
fast.save("model.turbo")
turbo_tvm.tune("model.turbo")                    # the best kernels for this machine, kept in tuning_logs/
fast = turbo_tvm.load("model.turbo")             # no torch, no compiler
with turbo_tvm.Engine(fast) as engine:           # many requests at once, in the best batches
    vector = engine.infer_sync(ids_a)

The other exceptions are in `turbo_tvm.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbo_tvm.errors import ArtifactError, CompileError, EngineError, InputError, TurboError

if TYPE_CHECKING:
    from turbo_tvm.compiler.compile import compile
    from turbo_tvm.runtime.loader import load
    from turbo_tvm.runtime.model import CompiledModel
    from turbo_tvm.runtime.scheduling.engine import Engine
    from turbo_tvm.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CompileError",
    "CompiledModel",
    "Engine",
    "EngineError",
    "InputError",
    "TurboError",
    "__version__",
    "compile",
    "load",
    "tune",
]

_LAZY = {
    "compile": "turbo_tvm.compiler.compile",
    "load": "turbo_tvm.runtime.loader",
    "tune": "turbo_tvm.tuning.tune",
    "CompiledModel": "turbo_tvm.runtime.model",
    "Engine": "turbo_tvm.runtime.scheduling.engine",
}


def __getattr__(name: str) -> Any:
    """Import what needs TVM, and what needs PyTorch, only when it is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'turbo_tvm' has no attribute {name!r}")
    import importlib

    from turbo_tvm import config

    if name == "load":
        config.import_tvm_to_run()
    elif name in ("compile", "tune"):
        config.check_tvm_can_compile()
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
