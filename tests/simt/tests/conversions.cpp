// binary16 and bfloat16 against their definition: every pattern, and every rounding boundary.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "harness.h"

namespace simt_test {
namespace {

// A 16-bit format with this many significand bits and this exponent bias.
struct Format {
  int significand_bits;
  int bias;

  unsigned int infinity() const { return 0x7fffu >> significand_bits << significand_bits; }
  double value(unsigned int bits) const {
    const int exponent = static_cast<int>((bits & 0x7fff) >> significand_bits);
    const unsigned int fraction = bits & ((1u << significand_bits) - 1);
    const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias - significand_bits)
                                           : std::ldexp(fraction + (1u << significand_bits),
                                                        exponent - bias - significand_bits);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
};
constexpr Format kHalf{10, 15};
constexpr Format kBfloat16{7, 127};

template <typename T>
unsigned int bits_of(T value) {
  return value.__x;
}

template <typename T>
void check_every_pattern(const Format& format) {
  for (unsigned int bits = 0; bits <= 0xffff; ++bits) {
    T stored;
    stored.__x = static_cast<unsigned short>(bits);
    const float value = static_cast<float>(stored);
    const unsigned int magnitude = bits & 0x7fff;
    if (magnitude > format.infinity()) {
      EXPECT(std::isnan(value) && bits_of(T(value)) == 0x7fff);
      EXPECT(bits_of(T(static_cast<double>(value))) == 0x7fff);
      continue;
    }
    if (magnitude == format.infinity()) {
      EXPECT(std::isinf(value));
    } else {
      EXPECT(static_cast<double>(value) == format.value(bits));
    }
    EXPECT(std::signbit(value) == (bits > 0x7fff));
    EXPECT(bits_of(T(value)) == bits && bits_of(T(static_cast<double>(value))) == bits);
  }
}

// Between each two neighbours: a tie goes to the even one, and what is off the tie by the least
// bit of a float or a double to the nearer one.
template <typename T>
void check_every_boundary(const Format& format) {
  for (unsigned int low = 0; low < format.infinity(); ++low) {
    const unsigned int high = low + 1;
    // Infinity stands in for the next power of two here.
    const double tie = (format.value(low) + format.value(high)) / 2;
    const unsigned int even = low % 2 == 0 ? low : high;
    for (const unsigned int sign : {0u, 0x8000u}) {
      const double signed_tie = sign != 0 ? -tie : tie;
      const double outward = sign != 0 ? -INFINITY : INFINITY;
      EXPECT(bits_of(T(signed_tie)) == (even | sign));
      EXPECT(bits_of(T(std::nextafter(signed_tie, 0.0))) == (low | sign));
      EXPECT(bits_of(T(std::nextafter(signed_tie, outward))) == (high | sign));
      const auto narrow = static_cast<float>(signed_tie);
      if (static_cast<double>(narrow) != signed_tie) continue;
      EXPECT(bits_of(T(narrow)) == (even | sign));
      EXPECT(bits_of(T(std::nextafterf(narrow, 0.0f))) == (low | sign));
      EXPECT(bits_of(T(std::nextafterf(narrow, static_cast<float>(outward)))) == (high | sign));
    }
  }
}

SIMT_CASE(half_every_pattern) { check_every_pattern<__half>(kHalf); }
SIMT_CASE(half_every_boundary) { check_every_boundary<__half>(kHalf); }
SIMT_CASE(bfloat16_every_pattern) { check_every_pattern<__nv_bfloat16>(kBfloat16); }
SIMT_CASE(bfloat16_every_boundary) { check_every_boundary<__nv_bfloat16>(kBfloat16); }

SIMT_CASE(conversions_beyond_the_range) {
  EXPECT(bits_of(__float2half_rn(65519.996f)) == 0x7bff &&
         bits_of(__float2half_rn(65520)) == 0x7c00);
  EXPECT(bits_of(__float2half_rn(-1e30f)) == 0xfc00 && bits_of(__double2half(1e300)) == 0x7c00);
  EXPECT(bits_of(__double2half(-1e-300)) == 0x8000 && bits_of(__float2half_rn(1e-30f)) == 0);
  EXPECT(bits_of(__float2bfloat16_rn(3.4e38f)) == 0x7f80 &&
         bits_of(__double2bfloat16(-1e300)) == 0xff80);
  EXPECT(bits_of(__double2bfloat16(1e-300)) == 0 &&
         bits_of(__float2bfloat16_rn(INFINITY)) == 0x7f80);
}

SIMT_CASE(pairs_of_halves) {
  const __half2 pair = __floats2half2_rn(1.5f, -2.25f);
  EXPECT(__low2float(pair) == 1.5f && __high2float(pair) == -2.25f);
  EXPECT(__half22float2(pair).y == -2.25f && sizeof(pair) == 4 && alignof(__half2) == 4);
  const __nv_bfloat162 other = __floats2bfloat162_rn(0.5f, 8.0f);
  EXPECT(__low2float(other) == 0.5f && __high2float(other) == 8.0f);
  EXPECT(__bfloat1622float2(other).x == 0.5f && sizeof(other) == 4);
}

}  // namespace
}  // namespace simt_test
