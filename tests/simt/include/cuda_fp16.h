// Stand-in for <cuda_fp16.h>: binary16 storage and its conversions, rounded to nearest even.
// Arithmetic is left out: kernels compute in float.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "simt/vector_types.h"

struct __half_raw {
  unsigned short x;
};

namespace simt::detail {

constexpr unsigned short kHalfNan = 0x7fff;  // what the GPU's conversions return for any NaN

// A double converts in one rounding; by way of float it would be rounded twice.
inline unsigned short half_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto sign = static_cast<unsigned short>(bits >> 48 & 0x8000);
  const uint64_t magnitude = bits & 0x7fffffffffffffffull;
  if (magnitude > 0x7ff0000000000000ull) return kHalfNan;
  const int exponent = static_cast<int>(magnitude >> 52) - 1023;
  if (exponent > 15) return sign | 0x7c00;
  if (exponent < -25) return sign;
  const uint64_t significand = (magnitude & 0xfffffffffffffull) | 0x10000000000000ull;
  // Bits below the last place of the result; more of them where the result is subnormal.
  const int dropped = exponent >= -14 ? 42 : 42 + (-14 - exponent);
  uint64_t kept = significand >> dropped;
  const uint64_t rest = significand & ((uint64_t{1} << dropped) - 1);
  const uint64_t tie = uint64_t{1} << (dropped - 1);
  if (rest > tie || (rest == tie && (kept & 1) != 0)) ++kept;
  // A carry out of the significand goes on into the exponent, up to infinity.
  const uint64_t base = exponent >= -14 ? static_cast<uint64_t>(exponent + 14) << 10 : 0;
  return static_cast<unsigned short>(sign | (base + kept));
}

inline unsigned short half_bits(float value) {
#ifdef __F16C__
  if (value != value) return kHalfNan;
  return static_cast<unsigned short>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  return half_bits(static_cast<double>(value));
#endif
}

inline float half_value(unsigned short bits) {
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) {
    // Infinity, or a NaN made quiet.
    const uint32_t nan = magnitude > 0x7c00 ? 0x400000 : 0;
    const uint32_t whole = sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | nan;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
  }
  // The bits as a float, scaled: exact for normal and subnormal values alike.
  const uint32_t shifted = magnitude << 13;
  float value;
  std::memcpy(&value, &shifted, sizeof(value));
  value *= 0x1p112f;
  return sign != 0 ? -value : value;
#endif
}

}  // namespace simt::detail

struct alignas(2) __half {
  unsigned short __x;

  __half() = default;
  __half(__half_raw raw) : __x(raw.x) {}
  __half(float value) : __x(simt::detail::half_bits(value)) {}
  __half(double value) : __x(simt::detail::half_bits(value)) {}
  __half(int value) : __x(simt::detail::half_bits(static_cast<double>(value))) {}
  operator float() const { return simt::detail::half_value(__x); }
  operator __half_raw() const { return {__x}; }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;

  __half2() = default;
  __half2(__half x, __half y) : x(x), y(y) {}
};
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline float __half2float(__half value) { return simt::detail::half_value(value.__x); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __float2half(float value) { return __half(value); }
inline __half __double2half(double value) { return __half(value); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 __float2half2_rn(float value) { return {__half(value), __half(value)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 value) { return {__half(value.x), __half(value.y)}; }
inline float2 __half22float2(__half2 value) {
  return {__half2float(value.x), __half2float(value.y)};
}
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return __half2float(value.x); }
inline float __high2float(__half2 value) { return __half2float(value.y); }
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {__half(__half2float(a.x) * __half2float(b.x)),
          __half(__half2float(a.y) * __half2float(b.y))};
}
// Products and sums are exact in double for all but operands that are far apart.
inline __half simt_fma(__half a, __half b, __half c) {
  return __half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {simt_fma(a.x, b.x, c.x), simt_fma(a.y, b.y, c.y)};
}
inline bool __hisnan(__half value) { return (value.__x & 0x7fff) > 0x7c00; }
