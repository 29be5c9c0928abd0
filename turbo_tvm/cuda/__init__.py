"""What NVIDIA GPUs need beyond a CPU: kernels for composites, TVM's lowering, machine code ahead of time."""
