"""CUDA schedules: the same kernel families as on the CPU, for any NVIDIA GPU from sm_70 on."""
