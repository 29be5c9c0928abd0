"""Runtime: artifact to results. Needs NumPy and the TVM runtime; never torch, onnx, passes or schedules."""

from turbo_tvm.config import let_tvm_use_every_core

let_tvm_use_every_core()
