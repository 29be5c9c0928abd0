"""The tables of `turbo-tvm inspect`, for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from turbo_tvm.artifact.manifest import (
    KernelSpec,
    Manifest,
    OutputSpec,
    ParameterSpec,
    PooledToken,
    RequestLimits,
    TextRule,
)
from turbo_tvm.cli import numbers
from turbo_tvm.cli.console import add_row, console, plain, print_fields, print_table, table
from turbo_tvm.errors import TurboError
from turbo_tvm.runtime.device import cpu_features

_SHOWN = 8  # labels


def show(file: Path, manifest: Manifest, lengths: list[int] | None) -> None:
    """Print all tables on stdout; with lengths, the cost of such a batch too."""
    out = console()
    print_fields(out, _overview(file, manifest))
    print_table(out, _kernels(manifest))
    if any(kernel.variants for kernel in manifest.kernels):
        print_table(out, _variants(manifest))
    print_table(out, _memory(manifest))
    print_table(out, _members(manifest))
    if manifest.tuning:
        out.print("[bold]Tuning logs that did not hold[/]")
        for reason in manifest.tuning:
            out.print(plain(f"  {reason}"))
    out.print("[bold]Not fused[/]" if manifest.declined else "[bold]Not fused[/]  nothing")
    for reason in manifest.declined:
        out.print(plain(f"  {reason}"))
    if lengths:
        out.print()
        print_fields(out, _batch(manifest, lengths))


def _overview(file: Path, m: Manifest) -> dict[str, str]:
    return {
        "file": f"{file}, {numbers.size(file.stat().st_size)}",
        "model": f"{m.name} ({m.model_type}), {m.source_parameters:,} parameters",
        "written by": f"turbo_tvm {m.turbo_version} with TVM {m.tvm_version}, format {m.format_version}",
        "target": f"{m.target.name} ({m.target.triple_arch} {m.target.mcpu})",
        **({"GPUs": ", ".join(m.target.architectures)} if m.target.architectures else {}),
        "CPU features": ", ".join(m.target.features) or "none beyond the architecture's own",
        "this machine": _verdict(m),
        "precision": m.precision,
        "layout": f"{m.layout}{numbers.why_padded(m)}, {m.row_tile} rows per tile",
        "inputs": ", ".join(f"{i.name} {i.dtype}" for i in m.inputs),
        "outputs": ", ".join(_output(o, m.primary) for o in m.outputs),
        **({"labels": _few(m.labels)} if m.labels else {}),
        "request limits": _request_limits(m.request_limits),
        **({"texts": _texts(m.texts)} if m.texts != TextRule() else {}),
        "positions": m.positions.kind,
        **({} if m.pooled.kind == "none" else {"pooled token": _pooled(m.pooled)}),
        "weights": _weights(m.parameters),
        "costs": "; ".join(f"{name} (off by {cost.error:.1%})" for name, cost in m.costs.items())
        or "not measured: turbo-tvm cost",
    }


def _few(labels: tuple[str, ...]) -> str:
    shown = ", ".join(labels[:_SHOWN])
    return shown if len(labels) <= _SHOWN else f"{shown}, ... ({len(labels):,})"


def _verdict(manifest: Manifest) -> str:
    try:
        cpu_features.check_host(manifest.target)
        if manifest.target.architectures:
            return "can run it if it has such a GPU"
    except TurboError as error:
        return f"cannot run it: {error}"
    return "can run it"


def _request_limits(limits: RequestLimits) -> str:
    image = limits.image
    if image is None:
        return (
            f"up to {limits.max_length} tokens per sequence, vocabulary {limits.vocab_size:,}, "
            f"token types {limits.type_vocab_size}"
        )
    return (
        f"images of {image.channels} x {image.height} x {image.width} in patches of {image.patch_height} x "
        f"{image.patch_width}, {image.tokens} tokens"
    )


def _texts(rule: TextRule) -> str:
    said = [] if rule.cut == "right" else ["cut at the left end"]
    said += [] if rule.token_types else ["no token types"]
    for name, prompt in rule.prompts.items():
        default = " (the default)" if name == rule.default_prompt else ""
        said.append(f"prompt {name} {prompt!r}{default}")
    return ", ".join(said) or "prompts are left out of the pooling"


def _pooled(rule: PooledToken) -> str:
    return "the first of the largest id" if rule.kind == "largest" else f"the first of id {rule.token_id}"


def _output(spec: OutputSpec, primary: str | None) -> str:
    shape = f"per {spec.kind}" if spec.squeeze else f"{spec.columns} per {spec.kind}"
    return f"{spec.name} {spec.dtype} ({shape}{', returned by default' if spec.name == primary else ''})"


def _weights(parameters: tuple[ParameterSpec, ...]) -> str:
    total = sum(int(np.prod(p.shape, dtype=np.int64)) * np.dtype(p.dtype).itemsize for p in parameters)
    return f"{len(parameters)} arrays, {numbers.size(total)}"


def _kernels(manifest: Manifest) -> Table:
    rows = table("Kernels", ["family", "name", "shape", "calls>", "FLOP/token>", "FLOP/pair>", "weights>"], "name")
    rows.caption = "FLOP and weights: all calls together; a pair is a query and a key of one sequence"
    for kernel in manifest.kernels:
        add_row(rows, kernel.family, kernel.name, kernel.shapes, str(kernel.calls), *_costs([kernel]))
    rows.add_section()
    add_row(rows, "total", "", "", str(sum(k.calls for k in manifest.kernels)), *_costs(list(manifest.kernels)))
    return rows


def _variants(manifest: Manifest) -> Table:
    rows = table("Tuned kernels", ["name", "rows up to>", "setting"], "name")
    for kernel in manifest.kernels:
        for number, variant in enumerate(kernel.variants):
            setting = " ".join(f"{name}={value}" for name, value in sorted(variant.setting.items())) or "default"
            bound = f"{variant.max_rows:,}" if variant.max_rows else "any"
            add_row(rows, "" if number else kernel.name, bound, setting)
    return rows


def _costs(kernels: list[KernelSpec]) -> list[str]:
    weights = sum(k.calls * k.bytes_weights for k in kernels)
    per_token, per_pair = numbers.flops_per_token(kernels), numbers.flops_per_pair(kernels)
    return [_count(per_token), _count(per_pair), numbers.size(weights) if weights else ""]


def _count(flops: float) -> str:
    return numbers.flops(flops).removesuffix("FLOP").strip() if flops else ""


def _memory(manifest: Manifest) -> Table:
    rows = table("Buffers", ["name", "shape", "dtype", "first step>", "last step>", "may replace"], "shape")
    rows.caption = "where they lie follows from the batch: --memory --lengths 200,240"
    for b in manifest.buffers:
        add_row(rows, b.name, " x ".join(b.shape), b.dtype, str(b.first), str(b.last), b.replaces or "")
    return rows


def _members(manifest: Manifest) -> Table:
    rows = table("Members", ["name", "size>", "sha256"], "name")
    for name, member in manifest.members.items():
        add_row(rows, name, numbers.size(member.bytes), member.sha256[:16])
    return rows


def _batch(manifest: Manifest, lengths: list[int]) -> dict[str, str]:
    cost = numbers.batch_cost(manifest, lengths)
    share = f"{cost.flops_padded / cost.flops:.2f} x" if cost.flops else "the same"
    return {
        "batch": f"{cost.sequences} sequences, {cost.tokens:,} tokens",
        "arithmetic": f"{numbers.flops(cost.flops)}; padded to the longest it is {share}",
        "weights read": numbers.size(cost.bytes_weights),
        "buffers": numbers.size(cost.bytes_buffers),
    }
