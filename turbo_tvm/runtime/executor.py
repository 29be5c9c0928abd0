"""The executor: runs a compiled function on batches, with its own threads and memory.

One Relax VM is not thread-safe, so calls are serialised by a lock; TVM releases the interpreter lock inside kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from turbo_tvm import config
from turbo_tvm.artifact.manifest import Manifest, OutputSpec
from turbo_tvm.errors import TurboError
from turbo_tvm.runtime import batch as packing
from turbo_tvm.runtime import images
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.device.cpu_features import machine_name
from turbo_tvm.runtime.device.devices import Device, Gpu, Host
from turbo_tvm.runtime.device.graph_replay import GraphReplay
from turbo_tvm.runtime.memory.buffers import Buffers
from turbo_tvm.runtime.memory.table import Symbols

BIG_CORES = 1  # a mode of TVM's thread pool

Results = dict[str, list[np.ndarray]]


class Executor:
    """Runs batches on one model. Safe to call from several threads; they take turns."""

    def __init__(self, module: tvm.runtime.Module, manifest: Manifest, weights: Mapping[str, np.ndarray], threads: int):
        """weights: arrays by name, aligned to 64 bytes; used in place or copied to a GPU; they must outlive this."""
        self.manifest = manifest
        self.threads = threads
        self.device: Device = Gpu() if manifest.target.device == "cuda" else Host()
        self._module = module
        machine = self.another_vm()
        self._main = self._own = machine[manifest.entry]
        self._replay: GraphReplay | None = None
        if manifest.captured is not None and config.cuda_graphs():
            self._replay = GraphReplay(self._own, machine[manifest.captured], self._forget)
        self._inputs = [self.device.input(spec.dtype) for spec in manifest.inputs]
        self._weights = [self.device.upload(weights[p.name]) for p in manifest.parameters]
        self.buffers = Buffers(manifest.buffers, forget=self._forget, device=self.device)
        # A GPU starts blocks in order, and the last to finish should be short; a CPU's threads own whole heads.
        self._longest_first = manifest.target.device == "cuda"
        self._lock = threading.RLock()
        self._config_threadpool = tvm.get_global_func("runtime.config_threadpool")

    def run(self, batch: Batch, output: str | None = None) -> Results:
        """Run a batch and return its outputs by name: an fp32 array per sequence, (length, columns) or (columns,).

        output: the name of the one that is wanted; all by default. The arrays of an output share one piece of memory.
        Raises TurboError if there is no memory for the batch, or the model fails.
        """
        with self._lock:
            # TVM keeps one thread pool per calling thread, for all models: another may have set it since (1 us)
            self._config_threadpool(BIG_CORES, self.threads)
            try:
                return self._packed(batch, output) if self.manifest.layout == "packed" else self._padded(batch, output)
            except MemoryError as error:
                raise TurboError(f"there is not enough memory for this batch: {error}") from error

    @property
    def machine(self) -> str:
        """The name of what runs the kernels: the CPU with its number of threads, or the GPU."""
        if self.manifest.target.device == "cuda":
            return str(self.device.handle.device_name)
        return machine_name(self.threads)

    def symbols(self, lengths: Sequence[int]) -> dict[str, int]:
        """Return the symbols that the memory of a batch of these lengths depends on (`manifest.SYMBOLS`)."""
        return packing.symbols(self.manifest.layout, self.manifest.row_tile, lengths)

    def peak_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of intermediate and output tensors of a batch of these lengths."""
        with self._lock:
            return self.buffers.arena.peak_bytes(self.symbols(lengths))

    def fits(self, lengths: Sequence[int]) -> bool:
        """Return whether a batch of these lengths fits the memory budget."""
        with self._lock:
            return self.buffers.arena.fits(self.symbols(lengths))

    def check_memory(self, lengths: Sequence[int]) -> None:
        """Raise MemoryBudgetError if a batch of these lengths does not fit the memory budget."""
        with self._lock:
            self.buffers.arena.plan(self.symbols(lengths))

    @property
    def bytes_held(self) -> int:
        """Bytes that are held for buffers just now; reading it waits for no run."""
        return self.buffers.arena.bytes_held

    @property
    def memory(self) -> tuple[str, int | None]:
        """The strategy of the memory planner, and the budget in bytes."""
        return self.buffers.arena.strategy, self.buffers.arena.budget

    def set_memory(self, strategy: str, budget: int | None, largest: Symbols | None) -> None:
        """Plan memory in another way from the next run on; what is held is freed if the strategy changes.

        largest: the largest batch, for the strategy "static".
        """
        with self._lock:
            if strategy != self.buffers.arena.strategy:
                self._forget()
                self.buffers = Buffers(self.manifest.buffers, strategy, largest, self._forget, self.device)
            arena = self.buffers.arena
            arena.budget = budget
            if budget is not None and arena.bytes_held > budget:
                arena.release()

    def _forget(self) -> None:
        """Drop the last results, which lie in memory that is to be freed: TVM's VM keeps them until its next call."""
        if self._main is self._own:
            machine = self.another_vm()
            self._main = self._own = machine[self.manifest.entry]
            if self._replay is not None and self.manifest.captured is not None:
                self._replay.renew(self._own, machine[self.manifest.captured])

    @property
    def function(self) -> Callable[..., Any]:
        """The compiled function, which takes inputs, weights and buffers."""
        return self._main

    def another_vm(self) -> VirtualMachine:
        """Return a further VM on the same code."""
        return VirtualMachine(self._module, self.device.handle)

    @contextmanager
    def calling(self, function: Callable[..., Any]) -> Iterator[None]:
        """Let `run` call this in place of the compiled function, while other threads wait; for the profiler."""
        with self._lock:
            self._main = function
            try:
                yield
            finally:
                self._main = self._own

    def _call(
        self, arrays: Mapping[str, Callable[[], np.ndarray]], buffers: list[tvm.runtime.Tensor], output: str | None
    ) -> list[tuple[OutputSpec, np.ndarray]]:
        """Call the compiled function and return the wanted outputs, which the next call overwrites.

        arrays: by kind of input, what makes its array.
        """
        manifest = self.manifest
        inputs = [
            memory.tensor(arrays[spec.kind]()) for memory, spec in zip(self._inputs, manifest.inputs, strict=True)
        ]
        try:
            if self._replay is not None and self._main is self._own:
                out = self._replay(inputs, self._weights, buffers)
            else:
                out = self._main(*inputs, *self._weights, *buffers)
        except TurboError:
            raise
        except Exception as error:  # TVM raises Python's own exceptions
            raise TurboError(f"the compiled model failed: {error}") from error
        fields = [out] if isinstance(out, tvm.runtime.Tensor) else out
        return [
            (spec, self.device.download(fields[i]))
            for i, spec in enumerate(manifest.outputs)
            if output is None or output == spec.name
        ]

    def _packed(self, batch: Batch, output: str | None) -> Results:
        row_tile, cu_seqlens = self.manifest.row_tile, batch.cu_seqlens
        arrays = {
            "token_ids": lambda: packing.pack_rows(batch.token_ids, row_tile),
            "token_type_ids": lambda: packing.pack_rows(batch.token_type_ids, row_tile),
            "position_ids": lambda: packing.pack_rows(batch.positions, row_tile),
            "patches": lambda: self._patches(batch, row_tile),
            "cu_seqlens": lambda: cu_seqlens,
            "pooled_rows": lambda: packing.pooled_rows(self.manifest.pooled, batch.token_ids, cu_seqlens),
            "query_tiles": lambda: packing.query_tiles(cu_seqlens, self.manifest.query_tile, self._longest_first),
        }
        symbols = packing.packed_symbols(row_tile, len(batch.token_ids), len(cu_seqlens) - 1)
        results = self._call(arrays, self.buffers.tensors(symbols), output)
        return {spec.name: _split_packed(spec, result, cu_seqlens.tolist()) for spec, result in results}

    def _padded(self, batch: Batch, output: str | None) -> Results:
        lengths = batch.lengths
        mask = np.arange(lengths.max()) < lengths[:, None]
        arrays = {
            "token_ids": lambda: _pad(batch.token_ids, mask),
            "token_type_ids": lambda: _pad(batch.token_type_ids, mask),
            "position_ids": lambda: _pad(batch.positions, mask),
            "patches": lambda: self._patches(batch, 1).reshape(*mask.shape, -1),
            "attention_mask": lambda: mask,
        }
        return {
            spec.name: [
                row[:n].copy() if spec.kind == "token" else row.copy()
                for row, n in zip(result, lengths.tolist(), strict=True)
            ]
            for spec, result in self._call(arrays, self.buffers.tensors(self.symbols(lengths.tolist())), output)
        }

    def _patches(self, batch: Batch, row_tile: int) -> np.ndarray:
        image = self.manifest.request_limits.image
        assert image is not None and batch.images is not None  # `CompiledModel` lets no other batch in
        return images.pack_patches(batch.images, image, row_tile)


class ForeignExecutor:
    """Stands in for the executor of a model that was compiled for another machine: it can be saved, not run."""

    threads = 0
    machine = ""
    bytes_held = 0

    def __init__(self, reason: str):
        self._reason = reason

    @property
    def error(self) -> TurboError:
        """Why this machine cannot run the model."""
        return TurboError(f"{self._reason} (the model can be saved here and loaded on such a machine)")

    def run(self, batch: Batch, output: str | None = None) -> Results:
        """Raise TurboError, which says why this machine cannot run the model."""
        raise self.error

    @property
    def memory(self) -> tuple[str, int | None]:
        """The default strategy, and no budget."""
        return "compact", None

    def set_memory(self, strategy: str, budget: int | None, largest: Symbols | None) -> None:
        """Raises TurboError, as the others."""
        raise self.error

    def peak_bytes(self, lengths: Sequence[int]) -> int:
        """Raises TurboError, as the others."""
        raise self.error

    def fits(self, lengths: Sequence[int]) -> bool:
        """Raises TurboError, as the others."""
        raise self.error

    def check_memory(self, lengths: Sequence[int]) -> None:
        """Raises TurboError, as the others."""
        raise self.error


def _split_packed(spec: OutputSpec, result: np.ndarray, cu_seqlens: list[int]) -> list[np.ndarray]:
    """Return an array per sequence, all of them views of one copy of the packed rows."""
    rows = result.reshape(-1) if spec.squeeze else result.reshape(-1, spec.columns)
    if spec.kind == "sequence":
        return list(rows[: len(cu_seqlens) - 1].copy())
    copy = rows[: cu_seqlens[-1]].copy()
    return [copy[begin:end] for begin, end in pairwise(cu_seqlens)]


def _pad(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return one value per token as a matrix: in order where the mask is set, 0 elsewhere."""
    matrix = np.zeros(mask.shape, np.int64)
    matrix[mask] = values
    return matrix
