"""Which CUDA schedule implements a composite: `kernels.py` for NVIDIA GPUs."""

from __future__ import annotations

from tvm import relax

from turbo_tvm.compiler.kernel_names import last_dim, true_columns
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.compiler.kernels import (
    Recipe,
    WeightKernels,
    attention_options,
    embedding_options,
    linear_options,
    pool_options,
    rotary_options,
    row_formats,
)
from turbo_tvm.passes.composite import Composite
from turbo_tvm.schedules.cuda import attention, embedding, gate, linear, normalization, pooling, rotary, rows
from turbo_tvm.schedules.cuda.tiles import CudaTiles

_ON_HOST = ("pack_weight", "pack_bias", "cast_weight")
_TILED = ("linear", "attention")  # schedules that take tiles


class CudaKernels(WeightKernels):
    """Builds the CUDA kernel of a composite, and the host's for weights; the `schedule` of `lower_kernels`."""

    tiles: CudaTiles

    def recipe(self, fused: Composite, out: relax.TensorType) -> KernelRecipe:
        """Which schedule implements a composite, with which parameters."""
        factory, options = getattr(self, "_" + fused.name)(fused, out)
        tiles = self.tiles if fused.name in (*_ON_HOST, *_TILED) else None
        return KernelRecipe.of(factory, tiles, options | row_formats(fused, out))

    def _linear(self, fused: Composite, out: relax.TensorType) -> Recipe:
        options = linear_options(fused, out)
        if options.pop("norm_eps") is not None:
            raise ValueError("on a GPU a product's rows are normalised by a kernel of their own")
        return linear.linear, options

    def _attention(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return attention.attention, attention_options(fused)

    def _norm(self, fused: Composite, out: relax.TensorType) -> Recipe:
        vectors = str(fused.tensors[-1].ty.dtype)
        return normalization.norm, {"n": true_columns(fused, out), "vectors": vectors, **fused.attrs}

    def _gate(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return gate.gate, fused.attrs

    def _rotary(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rotary.rotary, rotary_options(fused)

    def _normalize(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return normalization.norm, {"n": last_dim(out), "kind": "l2", **fused.attrs}

    def _embedding(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return embedding.embedding, embedding_options(fused, out) | {"vectors": str(fused.tensors[-1].ty.dtype)}

    def _pool(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return pooling.pool, pool_options(fused, out)

    def _cast_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.cast_rows, {"columns": last_dim(out)}
