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
    """What a CPU can do at best with `threads` threads; FLOP/s and bytes/s.

    bf16_flops: bf16 products at best, in AMX's tiles or else AVX-512's dot product; None without either. dram: reads of
    memory, by one thread and by all. cache: reads of the last-level cache of cache_bytes, None where there is none to
    measure. cpu_share: the part of their time that the threads ran while they were measured; other programs had the
    rest.
    """

    cpu: str
    threads: int
    tvm_version: str
    fp32_flops: float
    bf16_flops: float | None
    dram_one_thread: float
    dram: float
    cache: float | None
    cache_bytes: int
    cpu_share: float = 1.0

    def peak(self, kernel: str) -> float:
        """FLOP/s for a kernel of this name: bf16 where the name says so."""
        return self.bf16_flops if self.bf16_flops and "bf16" in kernel.split("_") else self.fp32_flops

    def bandwidth(self, footprint: float) -> float:
        """Bytes/s for data that was last used `footprint` bytes ago: the cache's if it still holds them."""
        return self.cache if self.cache and footprint <= self.cache_bytes else self.dram


@dataclass(frozen=True)
class Work:
    """What one run asks of a kernel, all calls together.

    bytes_weights: weights, once per call. bytes_activations: tensors in and out, once per call. footprint: bytes of
    weights and buffers that a run touches before it needs the same weights again.
    """

    flops: float
    bytes_weights: float
    bytes_activations: float
    footprint: float

    @property
    def bytes_moved(self) -> float:
        """Weights and activations."""
        return self.bytes_weights + self.bytes_activations


@dataclass(frozen=True)
class KernelProfile:
    """One kernel, all its calls of a run together. seconds: median over the rounds; samples: seconds in each round.

    family and work are None for kernels that the manifest does not list (TVM's own), floor_s and bound also where no
    limits were given or the kernel's work counts as nothing.
    """

    name: str
    family: str | None
    calls: int
    seconds: float
    samples: tuple[float, ...]
    work: Work | None = None
    floor_s: float | None = None
    bound: Bound | None = None

    @property
    def flops_per_s(self) -> float | None:
        """None where the kernel's FLOPs are unknown or none."""
        return self.work.flops / self.seconds if self.work and self.work.flops and self.seconds else None

    @property
    def bytes_per_s(self) -> float | None:
        """None where the kernel's bytes are unknown."""
        return self.work.bytes_moved / self.seconds if self.work and self.seconds else None

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte."""
        return self.work.flops / self.work.bytes_moved if self.work and self.work.flops else None

    @property
    def fraction(self) -> float | None:
        """floor_s / seconds: 1 is this machine's limit."""
        return self.floor_s / self.seconds if self.floor_s is not None and self.seconds else None


@dataclass(frozen=True)
class ProfileReport:
    """Where the time of a run goes; medians over the rounds, in seconds.

    kernels_s: the kernels, timed one by one, with the hook's cost taken off. vm_s: the VM between kernels: an
    uninstrumented call of the VM less the kernels; 0 where noise hides it. python_s: packing and unpacking: run() less
    the VM. run_s, vm_call_s: run() and its VM, uninstrumented. hook_s: how much longer the VM takes with the hook.
    samples: seconds in each round of "run", "vm_call", "kernels" and "vm_call_hooked".
    """

    model: str
    layout: str
    lengths: tuple[int, ...]
    threads: int
    seed: int
    kernels: tuple[KernelProfile, ...]
    vm_s: float
    python_s: float
    run_s: float
    vm_call_s: float
    hook_s: float
    samples: dict[str, tuple[float, ...]]
    limits: MachineLimits | None = None

    @property
    def kernels_s(self) -> float:
        """All kernels together."""
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
        """By run_s."""
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
        """A part of total_s as a fraction of it."""
        return seconds / self.total_s


def floor(name: str, work: Work, limits: MachineLimits) -> tuple[float, Bound] | tuple[None, None]:
    """The least seconds for this work, and what bounds it; None twice for work that counts as nothing.

    Weights come from wherever they still are after the rest of the run, activations from the kernel before.
    """
    compute = work.flops / limits.peak(name)
    memory = work.bytes_weights / limits.bandwidth(work.footprint)
    memory += work.bytes_activations / limits.bandwidth(work.bytes_activations)
    if not compute and not memory:
        return None, None
    return (compute, "compute") if compute >= memory else (memory, "memory")
