"""Profiling: kernels timed from inside a run, set against what the machine can do at best."""
