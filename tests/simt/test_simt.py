"""The executor itself: right answers from hand-written kernels, exact counts, and every planted fault found."""

from __future__ import annotations

import numpy as np
import pytest
import simt


@pytest.fixture(scope="module")
def gpu():
    with simt.device() as device:
        yield device


def kernel(body: str, parameters: str = "float* x") -> str:
    return f"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
extern "C" __global__ void __launch_bounds__(64) kernel({parameters}) {{
  int t = threadIdx.x;
  {body}
}}
"""


def launch(gpu, body, *arguments, parameters="float* x", grid=(1,), block=(64,)):
    gpu.reset()
    gpu.launch(kernel(body, parameters), "kernel", grid, block, *arguments)
    return gpu.counts()


class TestAnswers:
    def test_every_thread_of_every_block_runs_once(self, gpu):
        x = np.zeros((2, 3, 4, 8, 2, 2), np.float32)
        body = "int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;"
        body += "x[((b * 8 + threadIdx.z) * 2 + threadIdx.y) * 2 + threadIdx.x] += b + 1;"
        counts = launch(gpu, body, x, grid=(4, 3, 2), block=(2, 2, 8))
        np.testing.assert_array_equal(x.reshape(24, -1), np.repeat(np.arange(1, 25)[:, None], 32, axis=1))
        assert (counts.blocks, counts.threads) == (24, 24 * 32)

    def test_a_block_sums_through_shared_memory_and_shuffles(self, gpu):
        x = np.arange(64, dtype=np.float32)
        body = """__shared__ float part[2];
        float s = x[t];
        for (int d = 16; d > 0; d >>= 1) s += __shfl_xor_sync(0xffffffff, s, d);
        if (t % 32 == 0) part[t / 32] = s;
        __syncthreads();
        x[t] = part[0] + part[1];"""
        counts = launch(gpu, body, x)
        np.testing.assert_array_equal(x, np.full(64, 2016))
        assert (counts.shuffles, counts.barriers, counts.barrier_arrivals) == (10, 1, 2)

    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            ("__shfl_sync(0xffffffff, v, 3)", lambda lane: 3),
            ("__shfl_sync(0xffffffff, v, 3, 8)", lambda lane: lane // 8 * 8 + 3),
            ("__shfl_up_sync(0xffffffff, v, 2)", lambda lane: lane - 2 if lane >= 2 else lane),
            ("__shfl_down_sync(0xffffffff, v, 5, 16)", lambda lane: lane + 5 if lane % 16 + 5 < 16 else lane),
            ("__shfl_xor_sync(0xffffffff, v, 9)", lambda lane: lane ^ 9),
        ],
    )
    def test_shuffles(self, gpu, call, expected):
        x = np.zeros(64, np.float32)
        launch(gpu, f"float v = t; x[t] = {call};", x)
        np.testing.assert_array_equal(x, [expected(t % 32) + t // 32 * 32 for t in range(64)])

    def test_votes_and_the_active_mask(self, gpu):
        x = np.zeros(64, np.int32)
        body = "if (t < 20) x[t] = __ballot_sync(0xfffff, t % 2) + (__activemask() == 0xfffff) * 0x100000;"
        body += "else if (t >= 32) x[t] = __any_sync(~0u, t == 40) + 2 * __all_sync(~0u, t != 40);"
        launch(gpu, body, x, parameters="int* x")
        np.testing.assert_array_equal(x[:20], 0xAAAAA + 0x100000)
        np.testing.assert_array_equal(x[32:], 1)

    @pytest.mark.parametrize(("type_name", "dtype"), [("half", np.float16), ("float", np.float32)])
    def test_halves_round_as_numpy_does(self, gpu, type_name, dtype):
        x = np.random.default_rng(0).normal(size=64).astype(dtype) * 1e3
        expected = (x.astype(np.float32) * np.float32(1.0001)).astype(dtype)
        launch(gpu, f"x[t] = ({type_name})((float)x[t] * 1.0001f);", x, parameters=f"{type_name}* x")
        np.testing.assert_array_equal(x, expected)

    def test_bfloat16_rounds_to_nearest_even(self, gpu):
        x = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, np.inf, 1e-40, 3.4e38, 0] * 8, np.float32)
        launch(gpu, "x[t] = (float)((nv_bfloat16)x[t]);", x)
        rounded = np.array([1.0, 1.0, 1.015625, -3.140625, np.inf, 2.0**-133, np.inf, 0], np.float32)
        np.testing.assert_array_equal(x, np.tile(rounded, 8))

    @pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("nv_bfloat16", np.uint16)])
    def test_wmma_multiplies_tiles_in_both_layouts(self, gpu, name, dtype):
        rng = np.random.default_rng(1)
        a, b = (rng.integers(-8, 8, (16, 16)).astype(np.float32) for _ in "ab")
        stored = [a, b.T.copy()]
        stored = [m.astype(dtype) if name == "half" else (m.view(np.uint32) >> 16).astype(dtype) for m in stored]
        out = np.ones((16, 16), np.float32)
        body = f"""using namespace nvcuda::wmma;
        fragment<matrix_a, 16, 16, 16, {name}, row_major> fa; fragment<matrix_b, 16, 16, 16, {name}, col_major> fb;
        fragment<accumulator, 16, 16, 16, float> fc;
        load_matrix_sync(fa, a, 16); load_matrix_sync(fb, b, 16); load_matrix_sync(fc, c, 16, mem_row_major);
        for (int i = 0; i < fc.num_elements; ++i) fc.x[i] *= 2;
        mma_sync(fc, fa, fb, fc);
        store_matrix_sync(c, fc, 16, mem_row_major);"""
        counts = launch(gpu, body, *stored, out, parameters=f"{name}* a, {name}* b, float* c", block=(32,))
        np.testing.assert_array_equal(out, a @ b + 2)
        assert counts.mma == 1


class TestCounts:
    @pytest.mark.parametrize(
        ("body", "requests", "sectors"),
        [
            ("x[t] = 1;", 2, 8),  # 32 x 4 bytes are 4 sectors
            ("x[t * 8] = 1;", 2, 64),  # a sector for each
            ("x[0] = 1;", 2, 2),
            ("*(float4*)(x + t * 4) = make_float4(1, 2, 3, 4);", 2, 32),
            ("if (t < 16) x[t] = 1;", 1, 2),
            ("for (int i = 0; i < t % 2 + 1; ++i) x[i * 64 + t] = 1;", 4, 16),  # divergent: the odd lanes go twice
        ],
    )
    def test_global_memory(self, gpu, body, requests, sectors):
        counts = launch(gpu, body, np.zeros(512, np.float32))
        assert (counts.global_store_requests, counts.global_store_sectors) == (requests, sectors)
        assert counts.global_load_requests == 0

    def test_halves_that_are_arguments_are_read(self, gpu):
        x = np.zeros(64, np.float16)
        counts = launch(gpu, "x[t] = __hfma(x[t], x[t], x[63 - t]);", x, parameters="half* x")
        assert (counts.global_load_requests, counts.global_store_requests) == (4, 2)  # x[t] may be read once or twice

    @pytest.mark.parametrize(
        ("index", "conflicts"), [("t", 0), ("t * 2", 1), ("t * 32", 31), ("t * 33", 0), ("0 * t", 0), ("t * 4", 3)]
    )
    def test_bank_conflicts(self, gpu, index, conflicts):
        body = f"__shared__ float s[2048]; s[{index}] = t; __syncwarp(); x[t] = s[{index}];"
        if index == "0 * t":  # reading one word is a broadcast; writing it would be a race
            body = "__shared__ float s[1]; if (t == 0) s[0] = 1; __syncwarp(); x[t] = s[0];"
        counts = launch(gpu, body, np.zeros(64, np.float32), block=(32,))
        assert counts.bank_conflicts == 2 * conflicts

    def test_wide_accesses_pass_in_quarters(self, gpu):
        body = "__shared__ alignas(16) float s[2048]; *(float4*)(s + t * 4) = make_float4(0, 0, 0, 0);"
        body += "__syncwarp(); x[t] = s[t * 4];"
        counts = launch(gpu, body, np.zeros(64, np.float32), block=(32,))
        assert counts.shared_requests == 2
        assert counts.shared_wavefronts == 4 + 4
        assert counts.bank_conflicts == 3  # of the reads, 4 words apart


FAULTS = {
    "a barrier in a branch": ("if (t < 32) __syncthreads();", "divergent barrier"),
    "two different barriers": ("if (t < 32) { __syncthreads(); }\n else { __syncthreads(); }", "divergent barrier"),
    "a barrier after a return": ("if (t == 7) return; __syncthreads();", "divergent barrier.*returned"),
    "a shuffle in a branch": ("float v = t; if (t % 2) v = __shfl_xor_sync(~0u, v, 2); x[t] = v;", "inactive lane"),
    "a shuffle from a lane beyond its mask": (
        "float v = t; if (t % 32 < 16) x[t] = __shfl_xor_sync(0xffff, v, 16);",
        "reads from inactive",
    ),
    "a mask without the caller": ("float v = t; x[t] = __shfl_xor_sync(0xffff, v, 1);", "without the calling lane"),
    "two shuffles of one mask": (
        "float v = t; if (t % 2) v = __shfl_xor_sync(~0u, v, 2);\n else v = __shfl_xor_sync(~0u, v, 4); x[t] = v;",
        "lane .* of its mask is at",
    ),
    "a vote that waits for a barrier": ("if (t < 16) __any_sync(~0u, 1); __syncthreads();", "and lane .* is at __sync"),
    "a write past the end": ("x[t + 1] = 1;", "writes 4 bytes out of bounds"),
    "a read before the beginning": ("x[t] = x[t - 1];", "reads 4 bytes out of bounds"),
    "shared memory past its end": (
        "__shared__ float s[64]; s[t + 4] = 1; __syncthreads(); x[t] = s[t];",
        "out of bounds",
    ),
    "a misaligned vector": ("*(float4*)(x + t % 32 + 1) = make_float4(0, 0, 0, 0);", "no multiple of 16"),
    "a misaligned pair": (
        "__shared__ float s[80]; *(float2*)(s + t) = make_float2(0, 0); x[t] = 1;",
        "no multiple of 8",
    ),
    "a missing barrier": (
        "__shared__ float s[64]; s[t] = t; x[t] = s[63 - t];",
        "race in shared memory|nothing has written",
    ),
    "a missing second barrier": (
        "__shared__ float s[64]; s[t] = t; __syncthreads(); x[t] = s[63 - t]; s[t] = 0;",
        "race in shared memory",
    ),
    "a barrier of a warp between two": (
        "__shared__ float s[64]; s[t] = t; __syncthreads(); x[t] = s[63 - t]; __syncwarp();"
        "s[t] = 0; __syncthreads(); x[t] += s[t];",
        "race in shared memory",
    ),
    "two writers": ("__shared__ float s[1]; s[0] = t; __syncthreads(); x[t] = s[0];", "race in shared memory"),
    "a shuffle in place of a barrier": (
        "__shared__ float s[64]; s[t] = t; float v = __shfl_xor_sync(~0u, 1.f, 1); x[t] = s[t ^ 1] + v;",
        "race in shared memory",
    ),
    "shared memory that nothing wrote": ("__shared__ float s[64]; x[t] = s[t];", "nothing has written"),
    "a wmma tile at an odd place": (
        "nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> f; nvcuda::wmma::fill_fragment(f, 0.f);"
        "nvcuda::wmma::store_matrix_sync(x + 4, f, 16, nvcuda::wmma::mem_row_major);",
        "no multiple of 32",
    ),
    "wmma rows at odd distances": (
        "nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> f; nvcuda::wmma::fill_fragment(f, 0.f);"
        "nvcuda::wmma::store_matrix_sync(x, f, 17, nvcuda::wmma::mem_row_major);",
        "no multiple of 16 bytes",
    ),
    "half a warp at a wmma operation": (
        "nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> f; nvcuda::wmma::fill_fragment(f, 0.f);"
        "if (t < 16) nvcuda::wmma::store_matrix_sync(x, f, 16, nvcuda::wmma::mem_row_major);",
        "inactive lane",
    ),
    "an atomic past the end": ("atomicAdd(x + 4096, 1.f);", "out of bounds"),
}


class TestFaults:
    @pytest.mark.parametrize("name", FAULTS)
    def test_is_found(self, gpu, name):
        body, message = FAULTS[name]
        size = 64 if "wmma" not in name else 4096
        with pytest.raises(RuntimeError, match=message):
            launch(gpu, body, np.zeros(size, np.float32))

    def test_the_next_kernel_runs(self, gpu):
        with pytest.raises(RuntimeError):
            launch(gpu, FAULTS["a missing barrier"][0], np.zeros(64, np.float32))
        x = np.zeros(64, np.float32)
        launch(gpu, "x[t] = t;", x)
        np.testing.assert_array_equal(x, np.arange(64))

    @pytest.mark.parametrize(
        "body",
        [
            "__shared__ float s[64]; s[t] = t; __syncthreads(); x[t] = s[63 - t]; __syncthreads(); s[t] = 0;",
            "__shared__ float s[64]; s[t] = t; __syncwarp(); x[t] = s[t ^ 1]; __syncwarp(); s[t] = 0;",
            "__shared__ float s[64]; if (t == 0) s[0] = 1; __syncthreads(); x[t] = s[0] + s[0];",
            "if (t < 32) { float v = t; x[t] = __shfl_xor_sync(~0u, v, 1); } __syncthreads();",
            "if (t % 32 < 16) { float v = t; x[t] = __shfl_xor_sync(0xffff, v, 1); }",
            "if (t == 5) return; x[t] = 1;",
        ],
    )
    def test_none_is_seen_in_a_right_kernel(self, gpu, body):
        launch(gpu, body, np.zeros(64, np.float32))


def test_the_device_is_there_while_it_is_asked_for():
    import tvm

    with simt.device():
        assert tvm.cuda(0).exist
        with simt.device():
            pass
        assert tvm.cuda(0).exist
