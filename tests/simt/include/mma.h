// wmma fragments of 16 x 16 x 16 tiles. Which element a lane holds where is the executor's secret, as it is the
// hardware's: only what the programming guide promises works (all elements treated alike, fragments of one type alike).
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
  static_assert(m == 16 && n == 16 && k == 16, "the executor knows tiles of 16 x 16 x 16");
  static constexpr int num_elements = std::is_same_v<Use, accumulator> ? 8 : 16;
  T x[num_elements];
};

namespace detail {
enum Kind { kFill, kLoad, kStore, kMultiply };
template <typename T>
constexpr int type_of() {  // of an element: 0 half, 1 bfloat16, 2 float
  return std::is_same_v<T, float> ? 2 : std::is_same_v<T, __nv_bfloat16> ? 1 : 0;
}
template <typename Layout>
constexpr int layout_of() {
  return std::is_same_v<Layout, col_major> ? mem_col_major : mem_row_major;
}
}  // namespace detail

template <typename Use, typename T, typename Layout>
void simt_fill(int, fragment<Use, 16, 16, 16, T, Layout>& f, T value) {
  for (T& element : f.x) element = value;
}
template <typename Use, typename T, typename Layout>
void simt_load(int line, fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned stride) {
  void* frags[4] = {f.x};
  simt_wmma(line, detail::kLoad, frags, p, stride, detail::layout_of<Layout>(),
            detail::type_of<T>() * 32 + f.num_elements);
}
template <typename T>
void simt_load(int line, fragment<accumulator, 16, 16, 16, T>& f, const T* p, unsigned stride, layout_t layout) {
  void* frags[4] = {f.x};
  simt_wmma(line, detail::kLoad, frags, p, stride, layout, detail::type_of<T>() * 32 + 8);
}
template <typename T>
void simt_store(int line, T* p, const fragment<accumulator, 16, 16, 16, T>& f, unsigned stride, layout_t layout) {
  void* frags[4] = {const_cast<T*>(f.x)};
  simt_wmma(line, detail::kStore, frags, p, stride, layout, detail::type_of<T>() * 32 + 8);
}
template <typename T, typename LA, typename LB>
void simt_multiply(int line, fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, LA>& a,
                   const fragment<matrix_b, 16, 16, 16, T, LB>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  void* frags[4] = {d.x, const_cast<T*>(a.x), const_cast<T*>(b.x), const_cast<float*>(c.x)};
  simt_wmma(line, detail::kMultiply, frags, nullptr, 0, 0, detail::type_of<T>() * 32 + 16);
}

#define fill_fragment(...) simt_fill(__LINE__, __VA_ARGS__)
#define load_matrix_sync(...) simt_load(__LINE__, __VA_ARGS__)
#define store_matrix_sync(...) simt_store(__LINE__, __VA_ARGS__)
#define mma_sync(...) simt_multiply(__LINE__, __VA_ARGS__)

}  // namespace nvcuda::wmma
