"""`python -m turbo_tvm` is the command `turbo-tvm`."""

from turbo_tvm.cli import main

main(prog_name="turbo-tvm")
