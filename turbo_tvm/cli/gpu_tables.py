"""The table of `turbo-tvm inspect --kernels`: the resources of a GPU that each kernel uses."""

from __future__ import annotations

from rich.table import Table

from turbo_tvm.artifact.manifest import DeviceKernelSpec, KernelSpec, Manifest
from turbo_tvm.cli import numbers
from turbo_tvm.cli.console import add_row, console, plain, print_table, table
from turbo_tvm.errors import TurboError
from turbo_tvm.profiling.occupancy import occupancy

_COLUMNS = [
    *("name", "registers>", "spilled>", "shared>", "threads>", "occupancy>", "barriers/row>", "shuffles/row>"),
    *("bytes/token>", "FLOP/token>"),
]


def show(manifest: Manifest, instructions: dict[str, dict[str, str]] | None, note: str) -> None:
    """Print a table per architecture. Raises TurboError for a model without GPU kernels.

    instructions: by architecture and kernel, a summary of its machine code. note: why there are none.
    """
    if not manifest.device_kernels:
        raise TurboError(f"{manifest.name} was compiled for {manifest.target.name}, and has no GPU kernels")
    out = console()
    known = {spec.name: spec for spec in manifest.kernels}
    for architecture in manifest.target.architectures:
        print_table(out, _table(architecture, manifest.device_kernels, known, (instructions or {}).get(architecture)))
    spilled = sum(kernel.spill_bytes > 0 for kernel in manifest.device_kernels)
    out.print(plain(f"{spilled} kernels spill registers" if spilled else "no kernel spills registers"))
    if note:
        out.print(plain(note))


def _table(
    architecture: str,
    kernels: tuple[DeviceKernelSpec, ...],
    known: dict[str, KernelSpec],
    instructions: dict[str, str] | None,
) -> Table:
    rows = table(f"Kernels on {architecture}", [*_COLUMNS, *(["machine code"] if instructions else [])], "name")
    rows.caption = (
        "registers and spilled bytes per thread, shared memory per block; occupancy: blocks on a multiprocessor, the "
        "share of its warps, and what limits it; barriers and shuffles as instructions of a warp, '+' per step of a "
        "loop over keys; bytes and FLOP of one call"
    )
    for kernel in kernels:
        if kernel.architecture == architecture:
            spec = known.get(kernel.name)
            cells = [
                *(kernel.name, str(kernel.registers), str(kernel.spill_bytes), _shared(kernel), str(kernel.threads)),
                *(_occupancy(kernel), _per_row(kernel, "barriers"), _per_row(kernel, "shuffles")),
                numbers.size(spec.bytes_per_token) if spec and spec.bytes_per_token else "",
                numbers.flops(spec.flops_per_token) if spec and spec.flops_per_token else "",
            ]
            add_row(rows, *cells, *([instructions.get(kernel.name, "")] if instructions else []))
    return rows


def _shared(kernel: DeviceKernelSpec) -> str:
    dynamic = f" + {numbers.size(kernel.dynamic_shared_bytes)} dynamic" if kernel.dynamic_shared_bytes else ""
    return numbers.size(kernel.static_shared_bytes) + dynamic


def _occupancy(kernel: DeviceKernelSpec) -> str:
    found = occupancy(kernel)
    return "" if found is None else f"{found.blocks}, {found.share:.0%}, {found.limit}"


def _per_row(kernel: DeviceKernelSpec, what: str) -> str:
    """Return barriers or shuffles per row: barriers count once per warp that arrives, shuffles as they are."""
    if not kernel.rows:
        return ""
    scale = -(-kernel.threads // 32) if what == "barriers" else 1
    once, step = getattr(kernel, what) * scale / kernel.rows, getattr(kernel, f"{what}_per_step") * scale / kernel.rows
    return f"{once:.3g}" + (f" + {step:.3g}" if step else "")
