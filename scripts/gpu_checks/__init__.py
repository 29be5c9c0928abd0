"""What `scripts/gpu_check` runs: answers, kernels and whole models on a GPU, beside PyTorch's."""
