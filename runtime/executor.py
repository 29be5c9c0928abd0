"""The executor: runs a compiled function on batches, with its own threads and memory.

One Relax VM is not thread-safe, so calls are serialised by a lock; TVM releases the interpreter lock inside kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from turbo_tvm.errors import TurboError
from turbo_tvm.runtime import batch as packing
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.buffers import Buffers
from turbo_tvm.runtime.manifest import Manifest, OutputSpec

BIG_CORES = 1  # a mode of TVM's thread pool


class Executor:
    """Runs batches on one model. Safe to call from several threads; they take turns."""

    def __init__(self, module: tvm.runtime.Module, manifest: Manifest, weights: Mapping[str, np.ndarray], threads: int):
        """weights: 64-byte aligned arrays by name; they are used in place and must outlive the executor."""
        self.manifest = manifest
        self.threads = threads
        self._module = module
        self._main = self.another_vm()["main"]
        self._weights = [tvm.runtime.from_dlpack(weights[p.name]) for p in manifest.parameters]
        self.buffers = Buffers(manifest.buffers, manifest.row_tile)
        self._lock = threading.RLock()
        self._config_threadpool = tvm.get_global_func("runtime.config_threadpool")

    def run(self, batch: Batch) -> dict[str, list[np.ndarray]]:
        """Every output of the model: one array per sequence, in order, (length, columns) or (columns,), fp32."""
        with self._lock:
            # TVM keeps one thread pool per calling thread, for all models: another may have set it since (1 us)
            self._config_threadpool(BIG_CORES, self.threads)
            return self._packed(batch) if self.manifest.layout == "packed" else self._padded(batch)

    @property
    def function(self) -> Callable[..., Any]:
        """The compiled function: inputs, weights, buffers."""
        return self._main

    def another_vm(self) -> VirtualMachine:
        """A VM of its own on the same code."""
        return VirtualMachine(self._module, tvm.cpu())

    @contextmanager
    def calling(self, function: Callable[..., Any]) -> Iterator[None]:
        """While open, `run` calls this in place of the compiled function, and other threads wait; for the profiler."""
        with self._lock:
            own, self._main = self._main, function
            try:
                yield
            finally:
                self._main = own

    def _call(self, inputs: list[np.ndarray], buffers: list[tvm.runtime.Tensor]) -> list[np.ndarray]:
        try:
            out = self._main(*[tvm.runtime.tensor(x) for x in inputs], *self._weights, *buffers)
        except tvm.error.TVMError as error:
            raise TurboError(f"the compiled model failed: {error}") from error
        fields = [out] if isinstance(out, tvm.runtime.Tensor) else list(out)
        return [np.from_dlpack(field) for field in fields]

    def _packed(self, batch: Batch) -> dict[str, list[np.ndarray]]:
        manifest, lengths = self.manifest, batch.lengths
        tiles = packing.row_tiles(lengths, manifest.row_tile)
        pooled = -(-len(lengths) // manifest.row_tile)
        arrays = {
            "token_ids": lambda: packing.pack_rows(batch.token_ids, manifest.row_tile),
            "token_type_ids": lambda: packing.pack_rows(batch.token_type_ids, manifest.row_tile),
            "position_ids": lambda: packing.pack_rows(batch.positions, manifest.row_tile),
            "cu_seqlens": lambda: packing.boundaries(lengths),
            "query_tiles": lambda: packing.query_tiles(lengths, manifest.query_tile),
        }
        inputs = [arrays[spec.kind]() for spec in manifest.inputs]
        results = self._call(inputs, self.buffers.tensors(tiles, pooled))
        ends = np.cumsum(lengths)
        return {
            spec.name: _split_packed(spec, result, ends - lengths, ends)
            for spec, result in zip(manifest.outputs, results, strict=True)
        }

    def _padded(self, batch: Batch) -> dict[str, list[np.ndarray]]:
        lengths = batch.lengths
        width = int(lengths.max())
        arrays = {
            "token_ids": lambda: _pad(batch.token_ids, width),
            "token_type_ids": lambda: _pad(batch.token_type_ids, width),
            "position_ids": lambda: _pad(batch.positions, width),
            "attention_mask": lambda: (np.arange(width)[None, :] < lengths[:, None]).astype(np.int64),
        }
        results = self._call([arrays[spec.kind]() for spec in self.manifest.inputs], [])
        return {
            spec.name: [
                row[:n].copy() if spec.kind == "token" else row.copy() for row, n in zip(result, lengths, strict=True)
            ]
            for spec, result in zip(self.manifest.outputs, results, strict=True)
        }


class ForeignExecutor:
    """Stands in for the executor of a model that was compiled for another machine: it can be saved, not run."""

    threads = 0

    def __init__(self, reason: str):
        self._reason = reason

    @property
    def error(self) -> TurboError:
        """Why this machine cannot run the model."""
        return TurboError(f"{self._reason} (the model can be saved here and loaded on such a machine)")

    def run(self, batch: Batch) -> dict[str, list[np.ndarray]]:
        """Raises TurboError: why this machine cannot run the model."""
        raise self.error


def _split_packed(spec: OutputSpec, result: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """One copy per sequence out of packed rows, which the next call overwrites."""
    rows = result.reshape(-1) if spec.squeeze else result.reshape(-1, spec.columns)
    if spec.kind == "sequence":
        return [rows[i].copy() for i in range(len(begins))]
    return [rows[begin:end].copy() for begin, end in zip(begins, ends, strict=True)]


def _pad(parts: tuple[np.ndarray, ...], width: int) -> np.ndarray:
    matrix = np.zeros((len(parts), width), np.int64)
    for row, part in zip(matrix, parts, strict=True):
        row[: len(part)] = part
    return matrix
