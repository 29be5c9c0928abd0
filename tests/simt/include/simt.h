// What a kernel sees of the executor. Every CUDA source is compiled with this header in front of it.
//
// A kernel's own loads and stores reach the executor through `-fsanitize=thread`, which calls `__tsan_read4` and its
// like before each of them; the executor implements those functions (executor.cc).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("simt_shared")))

struct dim3 {
  unsigned x, y, z;
};

extern "C" {
// Constant for the thread that asks: it may keep what it was told.
dim3 simt_thread_idx() __attribute__((const));
dim3 simt_block_idx() __attribute__((const));
dim3 simt_block_dim() __attribute__((const));
dim3 simt_grid_dim() __attribute__((const));
int simt_barrier(int line, int vote, int value);
void simt_warp_barrier(int line, unsigned mask);
unsigned simt_active_mask(int line);
uint64_t simt_shuffle(int line, unsigned mask, uint64_t value, int operand, int width, int kind);
unsigned simt_vote(int line, unsigned mask, int predicate);
void simt_atomic(void* address, size_t size);
void simt_wmma(int line, int kind, void* fragments[4], const void* memory, unsigned stride, int layout, int types);
}

#define threadIdx (simt_thread_idx())
#define blockIdx (simt_block_idx())
#define blockDim (simt_block_dim())
#define gridDim (simt_grid_dim())

#define __syncthreads() ((void)simt_barrier(__LINE__, 0, 0))
#define __syncthreads_or(p) (simt_barrier(__LINE__, 1, (p) != 0))
#define __syncwarp(...) simt::warp_barrier(__LINE__, ##__VA_ARGS__)
#define __activemask() (simt_active_mask(__LINE__))
#define __shfl_sync(...) simt::shuffle(__LINE__, simt::kIndex, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle(__LINE__, simt::kUp, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle(__LINE__, simt::kDown, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle(__LINE__, simt::kXor, __VA_ARGS__)
#define __ballot_sync(mask, p) (simt_vote(__LINE__, mask, (p) != 0))
#define __any_sync(mask, p) (simt_vote(__LINE__, mask, (p) != 0) != 0)
#define __all_sync(mask, p) (simt_vote(__LINE__, mask, (p) == 0) == 0)

namespace simt {

enum Shuffle { kIndex, kUp, kDown, kXor };

inline void warp_barrier(int line, unsigned mask = 0xffffffffu) { simt_warp_barrier(line, mask); }

template <typename T>
__attribute__((no_sanitize("thread"))) inline T shuffle(int line, int kind, unsigned mask, T value, int operand,
                                                        int width = 32) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt_shuffle(line, mask, bits, operand, width, kind);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename... Args, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<Args*>(args[I])...);
}

template <typename... Args>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Args...), void** args) {
  call(kernel, args, std::index_sequence_for<Args...>());
}

}  // namespace simt

// Vector types: an access to one is a single access of its size.
#define SIMT_VECTORS(T, base, a2, a4)                                                              \
  struct alignas(a2) base##2 { T x, y; };                                                          \
  struct base##3 { T x, y, z; };                                                                   \
  struct alignas(a4) base##4 { T x, y, z, w; };                                                    \
  inline base##2 make_##base##2(T x, T y) { return {x, y}; }                                       \
  inline base##3 make_##base##3(T x, T y, T z) { return {x, y, z}; }                               \
  inline base##4 make_##base##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(signed char, char, 2, 4)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned int, uint, 8, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
SIMT_VECTORS(long long, longlong, 16, 16)
SIMT_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef SIMT_VECTORS

#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF ((double)INFINITY)

template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));  // a number wins over NaN, as in CUDA
  return T(a) > T(b) ? T(a) : T(b);
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(a) < T(b) ? T(a) : T(b);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T atomicAdd(T* address, T value) {  // one thread runs at a time
  simt_atomic(address, sizeof(T));
  T old = *address;
  *address = old + value;
  return old;
}
