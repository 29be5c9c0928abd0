"""Records of a profile, and the arithmetic of a roofline: pure functions over what was measured.

A kernel can take no less time than its floor: the larger of FLOPs / peak and the time to read its bytes. A fraction is
floor / time. FLOPs count real tokens only, so the surplus rows of a row tile show as loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class MachineLimits:
    """What a CPU can do at best with `threads` threads, in FLOP/s and bytes/s."""

    cpu: str
    threads: int
    tvm_version: str
    fp32_flops: float  # fused multiply-adds
    bf16_flops: float | None  # products in AMX's tiles, or else AVX-512's dot product; None without either
    dram_one_thread: float  # reads of memory by one thread
    dram: float  # reads of memory by all threads
    cache: float | None  # reads of the last-level cache; None where there is none to measure
    cache_bytes: int  # its size
    cpu_share: float = 1.0  # the part of the time that the threads ran while measured; other programs had the rest

    def peak(self, kernel: str) -> float:
        """Return the FLOP/s for a kernel of this name: bf16 where the name says so."""
        return self.bf16_flops if self.bf16_flops and "bf16" in kernel.split("_") else self.fp32_flops

    def bandwidth(self, footprint: float) -> float:
        """Return the bytes/s for data that was last used `footprint` bytes ago: the cache's if it still holds that."""
        return self.cache if self.cache and footprint <= self.cache_bytes else self.dram


@dataclass(frozen=True)
class Work:
    """The work of a kernel in one run, all calls together."""

    flops: float
    bytes_weights: float  # once per call
    bytes_activations: float  # tensors in and out, once per call
    footprint: float  # bytes of weights and buffers that a run touches before it needs the same weights again

    @property
    def bytes_moved(self) -> float:
        """Bytes of weights and activations."""
        return self.bytes_weights + self.bytes_activations


@dataclass(frozen=True)
class KernelProfile:
    """One kernel, all its calls of a run together."""

    name: str
    family: str | None  # None for kernels that the manifest does not list, which are TVM's own
    calls: int
    seconds: float  # median over the rounds
    samples: tuple[float, ...]  # seconds in each round
    work: Work | None = None  # None as `family`
    floor_s: float | None = None  # None also where no limits were given, or the work counts as nothing
    bound: Bound | None = None  # None as `floor_s`

    @property
    def flops_per_s(self) -> float | None:
        """FLOP/s; None where the kernel's FLOPs are unknown or zero."""
        return self.work.flops / self.seconds if self.work and self.work.flops and self.seconds else None

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes per second; None where the kernel's bytes are unknown."""
        return self.work.bytes_moved / self.seconds if self.work and self.seconds else None

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte; None where either is unknown or zero."""
        return self.work.flops / self.work.bytes_moved if self.work and self.work.flops else None

    @property
    def fraction(self) -> float | None:
        """The floor divided by the time: 1 is this machine's limit."""
        return self.floor_s / self.seconds if self.floor_s is not None and self.seconds else None


@dataclass(frozen=True)
class ProfileReport:
    """Where the time of a run goes; times are medians over the rounds, in seconds."""

    model: str
    layout: str
    lengths: tuple[int, ...]  # tokens of each sequence
    threads: int
    seed: int
    kernels: tuple[KernelProfile, ...]
    vm_s: float  # the VM between kernels: an uninstrumented call of the VM less the kernels; 0 where noise hides it
    python_s: float  # packing and unpacking: run() less the VM
    run_s: float  # run(), uninstrumented
    vm_call_s: float  # the VM in run(), uninstrumented
    hook_s: float  # how much longer the VM takes with the hook
    samples: dict[str, tuple[float, ...]]  # in each round, of "run", "vm_call", "kernels" and "vm_call_hooked"
    limits: MachineLimits | None = None

    @property
    def kernels_s(self) -> float:
        """All kernels together, timed one by one, without the hook's cost."""
        return sum(k.seconds for k in self.kernels)

    @property
    def total_s(self) -> float:
        """Kernels, VM and Python: run_s up to noise."""
        return self.kernels_s + self.vm_s + self.python_s

    @property
    def tokens(self) -> int:
        """Tokens of one run."""
        return sum(self.lengths)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of run()."""
        return self.tokens / self.run_s

    @property
    def flops(self) -> float:
        """FLOPs of one run, of the kernels whose FLOPs are known."""
        return sum(k.work.flops for k in self.kernels if k.work)

    @property
    def floor_s(self) -> float | None:
        """The floors of all kernels together; None without any."""
        floors = [k.floor_s for k in self.kernels if k.floor_s is not None]
        return sum(floors) if floors else None

    def share(self, seconds: float) -> float:
        """Return `seconds` as a fraction of `total_s`."""
        return seconds / self.total_s


def floor(name: str, work: Work, limits: MachineLimits) -> tuple[float, Bound] | tuple[None, None]:
    """Return the least seconds for this work, and what bounds it; None twice for work that counts as nothing.

    Weights are read from the level of memory that still holds them after the rest of the run, activations from where
    the kernel before left them.
    """
    compute = work.flops / limits.peak(name)
    memory = work.bytes_weights / limits.bandwidth(work.footprint)
    memory += work.bytes_activations / limits.bandwidth(work.bytes_activations)
    if not compute and not memory:
        return None, None
    return (compute, "compute") if compute >= memory else (memory, "memory")
