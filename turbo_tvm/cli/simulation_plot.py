"""The picture of `turbo-tvm simulate --plot`: latency and throughput against the rate of arrivals, by policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbo_tvm.cli.pictures import save


def draw(results: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the picture as PNG or SVG, by the path's suffix. Needs matplotlib.

    Raises TurboError if the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps state

    figure = Figure(figsize=(12, 5), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for number, policy in enumerate(dict.fromkeys(r["policy"] for r in results)):
        rows = sorted((r for r in results if r["policy"] == policy), key=lambda r: r["rate"])
        rates, colour = [r["rate"] for r in rows], f"C{number}"
        latency.plot(rates, [1e3 * r["p50_s"] for r in rows], "o-", color=colour, label=f"{policy}, p50")
        latency.plot(rates, [1e3 * r["p99_s"] for r in rows], "^:", color=colour, label=f"{policy}, p99")
        throughput.plot(rates, [r["throughput"] for r in rows], "o-", color=colour, label=policy)
    latency.set(xlabel="requests/s", ylabel="latency, ms", yscale="log")
    throughput.set(xlabel="requests/s offered", ylabel="requests/s answered", ylim=(0, None))
    for axis in (latency, throughput):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)
