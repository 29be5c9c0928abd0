"""turbo_tvm."""
