"""Memory between kernels: planned by sequence length, placed in one arena."""
