// half: arithmetic in fp32, rounded to nearest even after each operation, as the hardware's is.
#pragma once

#include "simt.h"

struct __half {
  _Float16 bits;
  __half() = default;
  // Copies are assignments of `bits`: the compiler reports no read of a class that is a call's argument.
  __half(const __half& other) : bits(other.bits) {}
  __half(const volatile __half& other) : bits(other.bits) {}
  __half& operator=(const __half& other) {
    bits = other.bits;
    return *this;
  }
  void operator=(const __half& other) volatile { bits = other.bits; }
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  __half(T value) : bits(static_cast<_Float16>(static_cast<float>(value))) {}
  operator float() const { return static_cast<float>(bits); }
  __half& operator+=(__half b) { return *this = __half(float(*this) + float(b)); }
  __half& operator-=(__half b) { return *this = __half(float(*this) - float(b)); }
  __half& operator*=(__half b) { return *this = __half(float(*this) * float(b)); }
  __half& operator/=(__half b) { return *this = __half(float(*this) / float(b)); }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half first, __half second) : x(first), y(second) {}
};
using half2 = __half2;

#define SIMT_HALF_OPERATOR(op)                                                    \
  inline __half operator op(__half a, __half b) { return __half(float(a) op float(b)); }
SIMT_HALF_OPERATOR(+)
SIMT_HALF_OPERATOR(-)
SIMT_HALF_OPERATOR(*)
SIMT_HALF_OPERATOR(/)
#undef SIMT_HALF_OPERATOR
inline __half operator-(__half a) { return __half(-float(a)); }
inline bool operator<(__half a, __half b) { return float(a) < float(b); }
inline bool operator>(__half a, __half b) { return float(a) > float(b); }
inline bool __hgt(__half a, __half b) { return float(a) > float(b); }
inline bool __hlt(__half a, __half b) { return float(a) < float(b); }
inline float __half2float(__half a) { return float(a); }
inline __half __float2half(float a) { return __half(a); }
inline __half __float2half_rn(float a) { return __half(a); }
inline __half2 __floats2half2_rn(float a, float b) { return __half2(__half(a), __half(b)); }
inline __half hexp(__half a) { return __half(std::exp(float(a))); }
inline __half hsqrt(__half a) { return __half(std::sqrt(float(a))); }
inline __half hrsqrt(__half a) { return __half(1.0f / std::sqrt(float(a))); }
inline __half __hfma(__half a, __half b, __half c) { return __half(std::fma(float(a), float(b), float(c))); }
inline __half __ushort_as_half(unsigned short a) {
  __half b;
  std::memcpy(&b, &a, 2);
  return b;
}
