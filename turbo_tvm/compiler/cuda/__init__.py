"""What NVIDIA GPUs need beyond the pipeline: lowering to CUDA C, machine code ahead of time."""
