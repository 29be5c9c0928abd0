"""Schedules: kernels in TVMScript, a family per file: a computation as the loops that a device runs.

They know nothing of graphs or of the values of weights.
"""

from turbo_tvm import quick_script

quick_script.install()
