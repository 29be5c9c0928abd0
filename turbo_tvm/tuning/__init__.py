"""The tuner: tries settings of the kernels' knobs on a machine and keeps what it measured.

tasks       which kernels there are to tune, and in which batches they are measured
search      which settings to try next: XGBoost, or at random
candidate   a kernel with a setting: built, checked and timed, in a process of its own
bench       building and measuring the candidates of a kernel
workers     the processes, on this machine or behind a TVM RPC tracker
log         one file of JSON lines per kernel: every trial, and the variants chosen
tuner       the loop over kernels, trials and finals
apply       the variants of a log, for the compiler
report      default against tuned, side by side, and how the searches went
"""
