"""A process that answers a trace with one engine and says how its resident memory grew: `memory.py` starts it.

Reads one JSON object from stdin, writes one as the last line of stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OURS = "turbo_tvm"
ENGINES = (OURS, "PyTorch", "ONNX Runtime")

Answer = Callable[[np.ndarray], Any]


def turbo(directory: Path, threads: int) -> Answer:
    import turbo_tvm

    model = turbo_tvm.load(directory / "model.turbo", threads=threads)
    return lambda ids: model.run([ids])


def torch_eager(directory: Path, threads: int) -> Answer:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModel.from_pretrained(directory / "model").eval()

    def answer(ids: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids[None])).last_hidden_state

    return answer


def onnx_runtime(directory: Path, threads: int) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(directory / "sdpa.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])})


BUILDERS = dict(zip(ENGINES, (turbo, torch_eager, onnx_runtime), strict=True))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident() -> int:
    """The most there ever were since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resident()


def reset_most() -> bool:
    """Count the most from here on; whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main() -> None:
    asked = json.load(sys.stdin)
    answer = BUILDERS[asked["engine"]](Path(asked["directory"]), asked["threads"])
    rng = np.random.default_rng(0)
    answer(rng.integers(1, 1000, 1))
    counted, after_first, found = reset_most(), resident(), []
    for length in asked["lengths"]:
        answer(rng.integers(1, 1000, length))
        found.append(resident())
    print(
        json.dumps(
            {"after_first": after_first, "resident": found, "most": max(most_resident() if counted else 0, *found)}
        )
    )


if __name__ == "__main__":
    main()
