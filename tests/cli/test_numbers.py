"""Numbers for people, and what a batch costs."""

from __future__ import annotations

import pytest

from turbo_tvm.artifact.manifest import BufferSpec, KernelSpec, Manifest, RequestLimits, TargetSpec
from turbo_tvm.cli import numbers

KERNELS = (
    KernelSpec("linear_8x8", "linear", calls=3, flops_per_token=128.0, bytes_weights=256),
    KernelSpec("attention_8", "attention", calls=1, flops_per_pair=32.0),
)
BUFFERS = (
    BufferSpec("a", ("token_tiles", "6", "8"), "float32", 0, 1),
    BufferSpec("b", ("token_tiles", "6", "32"), "float32", 1, 2),
    BufferSpec("c", ("sequence_tiles", "6", "16"), "uint16", 2, 3),
)


def manifest(layout: str = "packed", declined: tuple[str, ...] = ()) -> Manifest:
    return Manifest(
        turbo_version="0",
        tvm_version="0",
        name="m",
        model_type="bert",
        entry="encode",
        target=TargetSpec("cpu", "x86_64", "x86-64-v3"),
        layout=layout,  # type: ignore[arg-type]
        row_tile=6,
        inputs=(),
        outputs=(),
        request_limits=RequestLimits(40, 50),
        kernels=KERNELS,
        buffers=BUFFERS if layout == "packed" else (),
        steps=("x", "y", "z"),
        declined=declined,
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (90_942_000, "90.9 MB"), (5e15, "5e+03 TB")],
)
def test_size(count, text):
    assert numbers.size(count) == text


def test_packed_batch_counts_its_own_tokens():
    cost = numbers.batch_cost(manifest(), [2, 5])
    assert (cost.sequences, cost.tokens) == (2, 7)
    assert cost.flops == 3 * 128 * 7 + 32 * (4 + 25)
    assert cost.flops_padded == 3 * 128 * 10 + 32 * 2 * 25
    assert cost.bytes_weights == 3 * 256


def test_padded_batch_counts_the_padding():
    cost = numbers.batch_cost(manifest("padded"), [2, 5])
    assert cost.flops == cost.flops_padded == 3 * 128 * 10 + 32 * 2 * 25


def test_buffers_come_in_whole_tiles_and_use_memory_again():
    cost = numbers.batch_cost(manifest(), [2, 5])
    assert cost.bytes_buffers == 12 * (8 + 32) * 4


def test_why_padded():
    assert numbers.why_padded(manifest()) == ""
    assert numbers.why_padded(manifest("padded", ("a sum",))) == " (a sum)"
