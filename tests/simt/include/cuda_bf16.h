// Stand-in for <cuda_bf16.h>: bfloat16 storage and its conversions, rounded to nearest even.
// Arithmetic is left out: kernels compute in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/vector_types.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

namespace simt::detail {

inline unsigned short bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // as the GPU's conversions, for any NaN
  // Adds just under half of the last place kept, and the half itself where that place is odd.
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// By way of a float rounded to odd: with its more than two extra bits, the second rounding then
// gives what a single one would.
inline unsigned short bfloat16_bits(double value) {
  float nearest = static_cast<float>(value);
  const auto back = static_cast<double>(nearest);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  if (back != value && finite && (bits & 1) == 0) {
    const bool away = value < 0 ? back < value : back > value;  // rounded away from zero
    bits = away ? bits - 1 : bits + 1;
    std::memcpy(&nearest, &bits, sizeof(bits));
  }
  return bfloat16_bits(nearest);
}

inline float bfloat16_value(unsigned short bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &whole, sizeof(value));
  return value;
}

}  // namespace simt::detail

struct alignas(2) __nv_bfloat16 {
  unsigned short __x;

  __nv_bfloat16() = default;
  __nv_bfloat16(__nv_bfloat16_raw raw) : __x(raw.x) {}
  __nv_bfloat16(float value) : __x(simt::detail::bfloat16_bits(value)) {}
  __nv_bfloat16(double value) : __x(simt::detail::bfloat16_bits(value)) {}
  __nv_bfloat16(int value) : __x(simt::detail::bfloat16_bits(static_cast<double>(value))) {}
  operator float() const { return simt::detail::bfloat16_value(__x); }
  operator __nv_bfloat16_raw() const { return {__x}; }
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;

  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return __nv_bfloat16(__nv_bfloat16_raw{bits});
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
inline float __bfloat162float(__nv_bfloat16 value) {
  return simt::detail::bfloat16_value(value.__x);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __double2bfloat16(double value) { return __nv_bfloat16(value); }

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 value) { return {value, value}; }
inline __nv_bfloat162 __float2bfloat162_rn(float value) {
  return {__nv_bfloat16(value), __nv_bfloat16(value)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) {
  return {__nv_bfloat16(value.x), __nv_bfloat16(value.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 value) { return value.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 value) { return value.y; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__nv_bfloat16(__bfloat162float(a.x) * __bfloat162float(b.x)),
          __nv_bfloat16(__bfloat162float(a.y) * __bfloat162float(b.y))};
}
// Products and sums are exact in double for all but operands that are far apart.
inline __nv_bfloat16 simt_fma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __nv_bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) +
                       __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {simt_fma(a.x, b.x, c.x), simt_fma(a.y, b.y, c.y)};
}
inline float __low2float(__nv_bfloat162 value) { return __bfloat162float(value.x); }
inline float __high2float(__nv_bfloat162 value) { return __bfloat162float(value.y); }
