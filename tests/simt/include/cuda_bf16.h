// bfloat16: arithmetic in fp32, rounded to nearest even after each operation.
#pragma once

#include "simt.h"

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  // Copies are assignments of `bits`: the compiler reports no read of a class that is a call's argument.
  __nv_bfloat16(const __nv_bfloat16& other) : bits(other.bits) {}
  __nv_bfloat16(const volatile __nv_bfloat16& other) : bits(other.bits) {}
  __nv_bfloat16& operator=(const __nv_bfloat16& other) {
    bits = other.bits;
    return *this;
  }
  void operator=(const __nv_bfloat16& other) volatile { bits = other.bits; }
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  __nv_bfloat16(T value) {
    float number = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &number, 4);
    bits = number != number ? 0x7fff : static_cast<unsigned short>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &word, 4);
    return number;
  }
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 first, __nv_bfloat16 second) : x(first), y(second) {}
};
using nv_bfloat162 = __nv_bfloat162;

#define SIMT_BF16_OPERATOR(op)                                                                       \
  inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(float(a) op float(b)); }
SIMT_BF16_OPERATOR(+)
SIMT_BF16_OPERATOR(-)
SIMT_BF16_OPERATOR(*)
SIMT_BF16_OPERATOR(/)
#undef SIMT_BF16_OPERATOR
inline __nv_bfloat16 operator-(__nv_bfloat16 a) { return __nv_bfloat16(-float(a)); }
inline bool operator<(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) < float(b); }
inline bool operator>(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) > float(b); }
inline bool __hgt(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) > float(b); }
inline bool __hlt(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) < float(b); }
inline float __bfloat162float(__nv_bfloat16 a) { return float(a); }
inline __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat16 hexp(__nv_bfloat16 a) { return __nv_bfloat16(std::exp(float(a))); }
inline __nv_bfloat16 hsqrt(__nv_bfloat16 a) { return __nv_bfloat16(std::sqrt(float(a))); }
