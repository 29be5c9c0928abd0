"""Where tensors lie and code runs: this CPU and its features, or a GPU."""
