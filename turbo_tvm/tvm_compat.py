"""What turbo_tvm relies on that TVM 0.27 does not promise: one place, and tests that say when TVM changes it.

A new version of TVM is tried with `pytest tests/test_tvm_compat.py` first. What only environment variables can tell TVM
is in `config.py`, which alone may set them; what makes its parser quick is in `quick_script.py`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tvm import ir, relax

EXPORTED = "main"  # what TVM's importer of PyTorch programs calls the function that it makes

LINKED_LIBRARIES = "external_mods"  # attribute of a module: compiled libraries that are linked with its code

ELEMENTWISE = 0  # operator pattern of a kernel whose elements depend on the inputs' elements at the same place alone

_PATTERN = "op_pattern"  # attribute of a kernel, by AnnotateTIROpPattern
_BUILTIN = "vm."  # functions of the virtual machine itself begin like this; others are kernels


def onnx_converters(frontend: ModuleType) -> dict[str, Any]:
    """Return the converters of TVM's ONNX frontend, by operator; frontend: `tvm.relax.frontend.onnx.onnx_frontend`."""
    return frontend._get_convert_map()


def is_elementwise(kernel_attrs: dict[str, Any]) -> bool:
    """Return whether TVM says of a kernel that its output may overwrite any of its inputs of the same type."""
    pattern = kernel_attrs.get(_PATTERN)
    return pattern is not None and int(pattern) == ELEMENTWISE


def calls_outside(call: relax.Call) -> str | None:
    """Return the name of the kernel outside the module that a lowered call is of, None if it is of the VM's own."""
    if not isinstance(call.op, relax.ExternFunc):
        return None
    name = str(call.op.global_symbol)
    return None if name.startswith(_BUILTIN) else name


def is_view(value: relax.Expr) -> bool:
    """Return whether a lowered value looks at the memory of others: a copy of a variable, a tuple, a reshape."""
    if isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem):
        return True
    if not isinstance(value, relax.Call):
        return False
    if isinstance(value.op, ir.Op):
        return value.op.name == "relax.reshape"
    return isinstance(value.op, relax.ExternFunc) and "reshape" in str(value.op.global_symbol)
