"""The checks of `scripts/gpu_check`. Each returns rows of the table; times in seconds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sized_operators as sized

import turbo_tvm
from turbo_tvm.ops.operand import Operand
from turbo_tvm.runtime import batch
from turbo_tvm.schedules.cuda import attention, linear, normalization, softmax
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

from .device import Gpu, build, interleaved, median, time_kernel, time_torch, upload

TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}  # of the largest value
DTYPES = {"fp32": "float32", "fp16": "float16"}
REDUCTIONS = ((8192, 128), (8192, 768), (8192, 1024), (8192, 3072), (512, 4099))
PRODUCTS = ((16, 768, 3072), (128, 768, 3072), (1024, 768, 3072), (4096, 768, 3072), (4096, 3072, 768))
ATTENTIONS = ((32, 32), (8, 128), (8, 512), (64, 64))
BATCHES = {"1x16": (16,), "1x128": (128,), "8x128": (128,) * 8, "32x64": (64,) * 32}


@dataclass
class Result:
    """One row: what was done, our median and theirs, and a note. samples: every one, by name. wrong: a false answer."""

    check: str
    what: str
    ours: float | None = None
    theirs: float | None = None
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    wrong: bool = False

    @property
    def ratio(self) -> float | None:
        """Theirs over ours."""
        return self.theirs / self.ours if self.ours and self.theirs else None


def bert(layers: int = 12, **sizes: int) -> Any:
    """BERT-base with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes), add_pooling_layer=False).eval()


def requests(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """Random token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n) for n in lengths]


def parity(gpu: Gpu, rounds: int, module: Any = None, lengths: Sequence[int] = (1, 7, 33, 128, 500)) -> list[Result]:
    """Answers in every precision, alone and again from a graph, against PyTorch's on the CPU."""
    import torch

    module = bert() if module is None else module
    ids = requests(lengths, module.config.vocab_size)
    with torch.no_grad():
        wanted = [module(torch.tensor(i)[None]).last_hidden_state[0].numpy() for i in ids]
    results = []
    for precision in gpu.precisions:
        compiled = turbo_tvm.compile(module, target=gpu.target, precision=precision, progress=False)
        errors = []
        for _ in range(3):  # the second and third from a graph
            answers = compiled.run(ids, output="last_hidden_state")
            errors.append(max(np.abs(a - w).max() / np.abs(w).max() for a, w in zip(answers, wanted, strict=True)))
        worst = max(errors)
        note = f"largest error {worst:.1e} of the largest value; {TOLERANCES[precision]:.0e} is allowed"
        results.append(Result("parity", precision, note=note, wrong=not worst <= TOLERANCES[precision]))
    return results


def copy_bandwidth(rounds: int) -> list[float]:
    """Bytes per second, read and written, of PyTorch's copy of 512 MiB."""
    import torch

    x = torch.empty(1 << 27, device="cuda")
    y = torch.empty_like(x)
    return [2 * x.numel() * 4 / s for s in time_torch(lambda: y.copy_(x), rounds)]


def reductions(gpu: Gpu, rounds: int, sizes: Sequence[tuple[int, int]] = REDUCTIONS) -> list[Result]:
    """Softmax, and residual + layer norm."""
    bandwidth = median(copy_bandwidth(rounds)) if gpu.torch_cuda else None
    results = []
    for dtype in DTYPES.values():
        for rows, n in sizes:
            row = Operand.rows(n, dtype)
            norm = sized.norm(CUDA_TILES, n, residual=row, vectors=dtype, x=row, out=row)
            kernels = {
                "softmax": softmax.softmax(sized.softmax(CUDA_TILES, n, x=row, out=row), CUDA_TILES),
                "norm": normalization.norm(norm, CUDA_TILES),
            }
            module = build(kernels, gpu)
            x, residual = (np.random.default_rng(i).normal(size=(rows, 1, n)).astype(dtype) for i in range(2))
            gamma, beta = np.ones(n, dtype), np.zeros(n, dtype)
            for name, inputs in (("softmax", [x]), ("norm", [x, residual, gamma, beta])):
                arguments = upload(*inputs, x)
                samples = {"ours": time_kernel(module, name, arguments, rounds)}
                moved = (2 if name == "softmax" else 3) * x.nbytes
                ours, theirs = median(samples["ours"]), None
                note = f"{moved / ours / 1e9:.0f} GB/s"
                if bandwidth:
                    samples["theirs"] = _torch_reduction(name, x, residual, rounds)
                    theirs = median(samples["theirs"])
                    note += f", {moved / ours / bandwidth:.0%} of a copy"
                results.append(Result("reductions", f"{name} {rows} x {n} {dtype}", ours, theirs, note, samples))
    return results


def _torch_reduction(name: str, x: np.ndarray, residual: np.ndarray, rounds: int) -> list[float]:
    import torch

    a, r = torch.tensor(x[:, 0], device="cuda"), torch.tensor(residual[:, 0], device="cuda")
    if name == "softmax":
        return time_torch(lambda: torch.softmax(a, -1), rounds)
    weight, bias = torch.ones_like(a[0]), torch.zeros_like(a[0])
    return time_torch(lambda: torch.nn.functional.layer_norm(a + r, a.shape[-1:], weight, bias), rounds)


def products(gpu: Gpu, rounds: int, sizes: Sequence[tuple[int, int, int]] = PRODUCTS) -> list[Result]:
    """The matrix kernel with bias and GELU."""
    results = []
    for dtype in DTYPES.values():
        for m, k, n in sizes:
            rows = {"x": Operand.rows(k, dtype), "out": Operand.rows(n, dtype)}
            operator = sized.linear(CUDA_TILES, k, n, activation="gelu", **rows)
            module = build({"linear": linear.linear(operator, CUDA_TILES)}, gpu)
            rng = np.random.default_rng(0)
            x, weight = rng.normal(size=(m, 1, k)).astype(dtype), (rng.normal(size=(k, n)) / math.sqrt(k)).astype(dtype)
            panels = CUDA_TILES.panels(n)
            packed = np.zeros((k, panels * CUDA_TILES.col_tile), dtype)
            packed[:, :n] = weight
            packed = np.ascontiguousarray(packed.reshape(k, panels, -1).transpose(1, 0, 2))
            bias = np.zeros(panels * CUDA_TILES.col_tile, np.float32)
            arguments = upload(x, packed, bias, np.zeros((m, 1, n), dtype))
            samples = {"ours": time_kernel(module, "linear", arguments, rounds)}
            ours, theirs = median(samples["ours"]), None
            if gpu.torch_cuda:
                samples["theirs"] = _torch_product(x, weight, rounds)
                theirs = median(samples["theirs"])
            note = f"{2 * m * k * n / ours / 1e12:.1f} TFLOP/s"
            results.append(Result("products", f"{m} x {k} x {n} {dtype}", ours, theirs, note, samples))
    return results


def _torch_product(x: np.ndarray, weight: np.ndarray, rounds: int) -> list[float]:
    import torch

    a, w = torch.tensor(x[:, 0], device="cuda"), torch.tensor(weight.T.copy(), device="cuda")
    b = torch.zeros(w.shape[0], dtype=a.dtype, device="cuda")
    return time_torch(lambda: torch.nn.functional.gelu(torch.nn.functional.linear(a, w, b)), rounds)


def attentions(
    gpu: Gpu, rounds: int, sizes: Sequence[tuple[int, int]] = ATTENTIONS, heads: int = 12, head_dim: int = 64
) -> list[Result]:
    """Attention of batches of one length, which PyTorch needs no padding for."""
    results = []
    inner = heads * head_dim
    for dtype in DTYPES.values():
        for count, length in sizes:
            operator = sized.attention(
                CUDA_TILES,
                heads,
                head_dim,
                length,
                columns=sized.qkv_columns([inner] * 3),
                dtype=dtype,
                out=Operand.rows(inner, dtype),
            )
            module = build({"attention": attention.attention(operator, CUDA_TILES)}, gpu)
            x = np.random.default_rng(0).normal(size=(count * length, 1, 3 * inner)).astype(dtype)
            tiles = batch.query_tiles(batch.cu_seqlens_of([length] * count), CUDA_TILES.query_tile, longest_first=True)
            (rows,) = upload(x)
            arguments = [rows] * 3 + upload(tiles, np.zeros((count * length, 1, inner), dtype))
            samples = {"ours": time_kernel(module, "attention", arguments, rounds)}
            ours, theirs = median(samples["ours"]), None
            if gpu.torch_cuda:
                samples["theirs"] = _torch_attention(x, count, length, heads, head_dim, rounds)
                theirs = median(samples["theirs"])
            note = f"{4 * count * length**2 * inner / ours / 1e12:.2f} TFLOP/s"
            results.append(Result("attention", f"{count} x {length} {dtype}", ours, theirs, note, samples))
    return results


def _torch_attention(x: np.ndarray, count: int, length: int, heads: int, head_dim: int, rounds: int) -> list[float]:
    import torch

    q, k, v = torch.tensor(x, device="cuda").reshape(count, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    return time_torch(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), rounds)


def models(gpu: Gpu, rounds: int, module: Any = None, batches: dict[str, Sequence[int]] | None = None) -> list[Result]:
    """Whole models, token ids in, vectors out, in fp16."""
    module = bert() if module is None else module
    compiled = turbo_tvm.compile(module, target=gpu.target, precision="fp16", progress=False)
    rng = np.random.default_rng(0)
    ragged = {"32 of 5..500": rng.integers(5, 501, 32).tolist(), "32 of 2..100": rng.integers(2, 101, 32).tolist()}
    rivals = _torch_models(module) if gpu.torch_cuda else {}
    results = []
    for name, lengths in (BATCHES | ragged if batches is None else batches).items():
        ids = requests(lengths, module.config.vocab_size)
        calls: dict[str, Callable[[], Any]] = {"turbo_tvm": lambda ids=ids: compiled.run(ids)}
        calls |= {rival: (lambda run=run, ids=ids: run(ids)) for rival, run in rivals.items()}
        samples = interleaved(calls, rounds)
        ours = median(samples["turbo_tvm"])
        best = min(rivals, key=lambda r: median(samples[r]), default=None)
        note = f"{sum(lengths) / ours:,.0f} tokens/s" + (f"; theirs: {best}, padded" if best else "")
        theirs = median(samples[best]) if best else None
        results.append(Result("models", f"{name} fp16", ours, theirs, note, samples))
    return results


def _torch_models(module: Any) -> dict[str, Callable[[list[np.ndarray]], Any]]:
    import copy

    import torch

    plain = copy.deepcopy(module).half().cuda()
    compiled = torch.compile(plain, dynamic=True)

    def runner(model: Any) -> Callable[[list[np.ndarray]], Any]:
        def run(ids: list[np.ndarray]) -> Any:
            longest = max(len(i) for i in ids)
            tokens = torch.zeros((len(ids), longest), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(ids):
                tokens[row, : len(i)], mask[row, : len(i)] = torch.tensor(i), 1
            with torch.no_grad():
                return model(tokens.cuda(), attention_mask=mask.cuda()).last_hidden_state.float().cpu()

        return run

    return {"PyTorch": runner(plain), "torch.compile": runner(compiled)}


def scheduler(gpu: Gpu, rounds: int, module: Any = None, count: int = 400, longest: int = 100) -> list[Result]:
    """Requests that all wait at once, by the DP scheduler and one by one."""
    module = bert() if module is None else module
    compiled = turbo_tvm.compile(module, target=gpu.target, precision="fp16", progress=False)
    spec = compiled.measure_cost(budget_s=5.0)
    lengths = np.random.default_rng(0).integers(2, longest + 1, count).tolist()
    ids = requests(lengths, module.config.vocab_size)

    async def serve(policy: str) -> float:
        async with turbo_tvm.Engine(compiled, policy=policy, max_queue=count) as engine:
            start = time.perf_counter()
            await asyncio.gather(*(engine.infer(i) for i in ids))
            return time.perf_counter() - start

    samples: dict[str, list[float]] = {"dp": [], "nobatch": []}
    for _ in range(max(1, rounds // 3)):
        for policy, times in samples.items():
            times.append(asyncio.run(serve(policy)))
    rate = count / median(samples["dp"])
    note = f"{rate:,.0f} requests/s; the cost model is off by {spec.error:.1%}; theirs: no batches"
    what = f"{count} requests of 2..{longest}"
    return [Result("scheduler", what, median(samples["dp"]), median(samples["nobatch"]), note, samples)]


CHECKS: dict[str, Callable[[Gpu, int], list[Result]]] = {
    "parity": parity,
    "reductions": reductions,
    "products": products,
    "attention": attentions,
    "models": models,
    "scheduler": scheduler,
}
