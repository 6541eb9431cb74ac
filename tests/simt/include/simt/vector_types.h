// CUDA's vector types and function qualifiers for the host model. Alignments are those of CUDA.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

#define SIMT_DEFINE_VECTORS(T, name, align2, align4)                 \
  struct name##1 { T x; };                                           \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_DEFINE_VECTORS(signed char, char, 2, 4)
SIMT_DEFINE_VECTORS(unsigned char, uchar, 2, 4)
SIMT_DEFINE_VECTORS(short, short, 4, 8)
SIMT_DEFINE_VECTORS(unsigned short, ushort, 4, 8)
SIMT_DEFINE_VECTORS(int, int, 8, 16)
SIMT_DEFINE_VECTORS(unsigned int, uint, 8, 16)
SIMT_DEFINE_VECTORS(long long, longlong, 16, 16)
SIMT_DEFINE_VECTORS(unsigned long long, ulonglong, 16, 16)
SIMT_DEFINE_VECTORS(float, float, 8, 16)
SIMT_DEFINE_VECTORS(double, double, 16, 16)
#undef SIMT_DEFINE_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
