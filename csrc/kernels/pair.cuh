// Two values that take the same arithmetic: neighbouring lanes of a window. From compute capability
// 10.0 on two floats are one instruction (add, mul and fma .f32x2), and half and bfloat16 lanes are
// added to floats without a conversion before. Everywhere every operation rounds once, to nearest,
// and a product is not contracted with a sum, so that the values are the same on every
// architecture.
#pragma once

#include <type_traits>

#include "platform.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BATCHNORM_CUDA_HAS_PAIRS 1
#endif

namespace batchnorm_cuda {

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

template <typename T>
__device__ __forceinline__ Pair<T> both(T value) {
  return {value, value};
}

#ifdef BATCHNORM_CUDA_HAS_PAIRS
__device__ __forceinline__ float2 to_float2(const Pair<float>& a) { return make_float2(a.x, a.y); }
__device__ __forceinline__ Pair<float> from_float2(const float2& a) { return {a.x, a.y}; }

__device__ __forceinline__ Pair<float> operator+(const Pair<float>& a, const Pair<float>& b) {
  return from_float2(__fadd2_rn(to_float2(a), to_float2(b)));
}
__device__ __forceinline__ Pair<float> operator*(const Pair<float>& a, const Pair<float>& b) {
  return from_float2(__fmul2_rn(to_float2(a), to_float2(b)));
}
__device__ __forceinline__ Pair<float> fused_multiply_add(const Pair<float>& a,
                                                          const Pair<float>& b,
                                                          const Pair<float>& c) {
  return from_float2(__ffma2_rn(to_float2(a), to_float2(b), to_float2(c)));
}
#endif

__device__ __forceinline__ float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename T>
__device__ __forceinline__ Pair<T> operator+(const Pair<T>& a, const Pair<T>& b) {
  return {a.x + b.x, a.y + b.y};
}
template <typename T>
__device__ __forceinline__ Pair<T> operator*(const Pair<T>& a, const Pair<T>& b) {
  return {product(a.x, b.x), product(a.y, b.y)};
}
template <typename T>
__device__ __forceinline__ Pair<T> operator-(const Pair<T>& a) {
  return {-a.x, -a.y};
}
template <typename T>
__device__ __forceinline__ Pair<T> operator-(const Pair<T>& a, const Pair<T>& b) {
  return a + -b;
}
template <typename T>
__device__ __forceinline__ Pair<T> fused_multiply_add(const Pair<T>& a, const Pair<T>& b,
                                                      const Pair<T>& c) {
  return {fused_multiply_add(a.x, b.x, c.x), fused_multiply_add(a.y, b.y, c.y)};
}

#ifdef BATCHNORM_CUDA_HAS_PAIRS
// The two half or bfloat16 values of `bits`, the lower one first, plus c.
template <bool kBFloat16>
__device__ __forceinline__ Pair<float> add_halves(uint32_t bits, const Pair<float>& c) {
  Pair<float> sum;
  if constexpr (kBFloat16) {
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; "
        "add.f32.bf16 %0, lo, %3; add.f32.bf16 %1, hi, %4;}"
        : "=f"(sum.x), "=f"(sum.y)
        : "r"(bits), "f"(c.x), "f"(c.y));
  } else {
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; "
        "add.f32.f16 %0, lo, %3; add.f32.f16 %1, hi, %4;}"
        : "=f"(sum.x), "=f"(sum.y)
        : "r"(bits), "f"(c.x), "f"(c.y));
  }
  return sum;
}
#endif

}  // namespace batchnorm_cuda
