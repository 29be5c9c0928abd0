"""KServe v2, as Triton speaks it: JSON and binary tensors over HTTP, and gRPC."""
