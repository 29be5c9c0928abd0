"""Schedules: one kernel family per file, computation to loops. No knowledge of graphs or of weights' values."""

from turbo_tvm.schedules.common import fast_macros

fast_macros.install()
