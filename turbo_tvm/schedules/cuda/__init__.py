"""CUDA schedules: the same kernel families as on the CPU, for any NVIDIA GPU from sm_70 on."""

from turbo_tvm.schedules.cuda import attention, embedding, gate, linear, normalization, pooling, rotary, rows, softmax

__all__ = ["attention", "embedding", "gate", "linear", "normalization", "pooling", "rotary", "rows", "softmax"]
