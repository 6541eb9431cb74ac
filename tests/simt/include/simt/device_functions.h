// Device-side built-ins of the host model: indices, barriers, warp operations, atomics, math.
// Barriers and warp operations take the source position of the call as a hidden last argument, to
// tell one barrier from another and to name it in faults.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt.h"
#include "simt/vector_types.h"

namespace simt::detail {

// Set by the scheduler whenever it switches threads. In a namespace, so that no library of CUDA in
// the same process can be taken for their definition.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

enum class BarrierKind { kPlain, kCount, kAnd, kOr };
enum class WarpKind { kSync, kBallot, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor };

// Blocks until every thread of the block is here; returns the reduction of `predicate` over them.
int block_barrier(BarrierKind kind, bool predicate, Site site);

// Blocks until every lane of `mask` is here. Shuffles return the value of lane `source`, kBallot
// the lanes with a non-zero value.
uint64_t warp_collective(WarpKind kind, uint32_t mask, uint64_t value, uint32_t source, Site site);

// Lane a shuffle of this kind reads from; the caller's own if that lies outside its segment.
uint32_t shuffle_source(WarpKind kind, int operand, int width, Site site);

void fence();
void note_progress();  // an atomic changed memory: threads that poll it are not stuck
uint64_t clock_ticks();

// The running block's cluster.
void cluster_arrive(Site site);
void cluster_wait(Site site);
void grid_barrier(Site site);
void* map_shared_rank(const void* address, unsigned int rank, Site site);
unsigned int shared_rank_of(const void* address, Site site);
unsigned int cluster_rank();
unsigned int cluster_size();
dim3 cluster_block_index();
dim3 cluster_dims();

template <typename T>
T shuffle(WarpKind kind, unsigned int mask, T value, int operand, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffle of up to 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(kind, mask, bits, shuffle_source(kind, operand, width, site), site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Fibers switch only inside the engine, so the plain read and write here are one atomic step.
template <typename T, typename F>
T atomic_update(T* address, F f, Site site) {
  on_atomic_access(address, sizeof(T), Access::kUpdate, Order::kRelaxed, site);
  const T old = *address;
  const T value = f(old);
  if (value != old) {
    note_progress();
    *address = value;
  }
  return old;
}

}  // namespace simt::detail

using simt::detail::blockDim;
using simt::detail::blockIdx;
using simt::detail::gridDim;
using simt::detail::threadIdx;
constexpr int warpSize = 32;

inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::detail::block_barrier(simt::detail::BarrierKind::kPlain, false, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::block_barrier(simt::detail::BarrierKind::kCount, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::block_barrier(simt::detail::BarrierKind::kAnd, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::block_barrier(simt::detail::BarrierKind::kOr, predicate != 0, site);
}

inline void __syncwarp(unsigned int mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::detail::warp_collective(simt::detail::WarpKind::kSync, mask, 0, 0, site);
}
inline unsigned int __ballot_sync(unsigned int mask, int predicate,
                                  simt::Site site = simt::Site::current()) {
  return static_cast<unsigned int>(simt::detail::warp_collective(simt::detail::WarpKind::kBallot,
                                                                 mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned int mask, int predicate, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned int mask, int predicate, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

template <typename T>
T __shfl_sync(unsigned int mask, T value, int lane, int width = 32,
              simt::Site site = simt::Site::current()) {
  return simt::detail::shuffle(simt::detail::WarpKind::kShuffle, mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                 simt::Site site = simt::Site::current()) {
  return simt::detail::shuffle(simt::detail::WarpKind::kShuffleUp, mask, value,
                               static_cast<int>(delta), width, site);
}
template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                   simt::Site site = simt::Site::current()) {
  return simt::detail::shuffle(simt::detail::WarpKind::kShuffleDown, mask, value,
                               static_cast<int>(delta), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = 32,
                  simt::Site site = simt::Site::current()) {
  return simt::detail::shuffle(simt::detail::WarpKind::kShuffleXor, mask, value, lane_mask, width,
                               site);
}

inline void __threadfence() { simt::detail::fence(); }
inline void __threadfence_block() { simt::detail::fence(); }
inline void __threadfence_system() { simt::detail::fence(); }
inline void __nanosleep(unsigned int, simt::Site site = simt::Site::current()) {
  simt::yield(site);
}
inline long long clock64() { return static_cast<long long>(simt::detail::clock_ticks()); }

// Clusters, under the names of the intrinsics behind cooperative_groups.
inline void __cluster_barrier_arrive(simt::Site site = simt::Site::current()) {
  simt::detail::cluster_arrive(site);
}
inline void __cluster_barrier_wait(simt::Site site = simt::Site::current()) {
  simt::detail::cluster_wait(site);
}
inline void* __cluster_map_shared_rank(const void* address, unsigned int rank,
                                       simt::Site site = simt::Site::current()) {
  return simt::detail::map_shared_rank(address, rank, site);
}
inline unsigned int __cluster_query_shared_rank(const void* address,
                                                simt::Site site = simt::Site::current()) {
  return simt::detail::shared_rank_of(address, site);
}
inline unsigned int __clusterRelativeBlockRank() { return simt::detail::cluster_rank(); }
inline unsigned int __clusterSizeInBlocks() { return simt::detail::cluster_size(); }
inline dim3 __clusterRelativeBlockIdx() { return simt::detail::cluster_block_index(); }
inline dim3 __clusterDim() { return simt::detail::cluster_dims(); }

// Integer atomics only: the kernels use no floating-point ones, being deterministic.
#define SIMT_DEFINE_ATOMICS(T)                                                                   \
  inline T atomicAdd(T* address, T value, simt::Site site = simt::Site::current()) {             \
    return simt::detail::atomic_update(                                                          \
        address, [value](T old) { return static_cast<T>(old + value); }, site);                  \
  }                                                                                              \
  inline T atomicExch(T* address, T value, simt::Site site = simt::Site::current()) {            \
    return simt::detail::atomic_update(address, [value](T) { return value; }, site);             \
  }                                                                                              \
  inline T atomicMax(T* address, T value, simt::Site site = simt::Site::current()) {             \
    return simt::detail::atomic_update(                                                          \
        address, [value](T old) { return old < value ? value : old; }, site);                    \
  }                                                                                              \
  inline T atomicMin(T* address, T value, simt::Site site = simt::Site::current()) {             \
    return simt::detail::atomic_update(                                                          \
        address, [value](T old) { return value < old ? value : old; }, site);                    \
  }                                                                                              \
  inline T atomicCAS(T* address, T expected, T value, simt::Site site = simt::Site::current()) { \
    return simt::detail::atomic_update(                                                          \
        address, [=](T old) { return old == expected ? value : old; }, site);                    \
  }
SIMT_DEFINE_ATOMICS(int)
SIMT_DEFINE_ATOMICS(unsigned int)
SIMT_DEFINE_ATOMICS(unsigned long long)
#undef SIMT_DEFINE_ATOMICS

#define SIMT_DEFINE_BITWISE_ATOMICS(T)                                                         \
  inline T atomicOr(T* address, T value, simt::Site site = simt::Site::current()) {            \
    return simt::detail::atomic_update(address, [value](T old) { return old | value; }, site); \
  }                                                                                            \
  inline T atomicAnd(T* address, T value, simt::Site site = simt::Site::current()) {           \
    return simt::detail::atomic_update(address, [value](T old) { return old & value; }, site); \
  }
SIMT_DEFINE_BITWISE_ATOMICS(int)
SIMT_DEFINE_BITWISE_ATOMICS(unsigned int)
SIMT_DEFINE_BITWISE_ATOMICS(unsigned long long)
#undef SIMT_DEFINE_BITWISE_ATOMICS

// Cache-hinted accesses: plain checked ones here.
#define SIMT_DEFINE_HINTED_ACCESS(load, store)                                      \
  template <typename T>                                                             \
  T load(const T* address, simt::Site site = simt::Site::current()) {               \
    simt::on_global_access(address, sizeof(T), simt::Access::kRead, site);          \
    return *address;                                                                \
  }                                                                                 \
  template <typename T>                                                             \
  void store(T* address, const T& value, simt::Site site = simt::Site::current()) { \
    simt::on_global_access(address, sizeof(T), simt::Access::kWrite, site);         \
    *address = value;                                                               \
  }
SIMT_DEFINE_HINTED_ACCESS(__ldg, __stwt)
SIMT_DEFINE_HINTED_ACCESS(__ldca, __stwb)
SIMT_DEFINE_HINTED_ACCESS(__ldcg, __stcg)
SIMT_DEFINE_HINTED_ACCESS(__ldcs, __stcs)
#undef SIMT_DEFINE_HINTED_ACCESS

// Correctly rounded where the GPU's own is only close: results may differ from it in the last bit.
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned int __umulhi(unsigned int x, unsigned int y) {
  return static_cast<unsigned int>((static_cast<uint64_t>(x) * y) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}

template <typename To, typename From>
To simt_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit cast between sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float x) { return simt_bit_cast<int>(x); }
inline unsigned int __float_as_uint(float x) { return simt_bit_cast<unsigned int>(x); }
inline float __int_as_float(int x) { return simt_bit_cast<float>(x); }
inline float __uint_as_float(unsigned int x) { return simt_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt_bit_cast<double>(x); }

#define SIMT_DEFINE_MIN_MAX(T)                        \
  constexpr T min(T x, T y) { return y < x ? y : x; } \
  constexpr T max(T x, T y) { return x < y ? y : x; }
SIMT_DEFINE_MIN_MAX(int)
SIMT_DEFINE_MIN_MAX(unsigned int)
SIMT_DEFINE_MIN_MAX(long)
SIMT_DEFINE_MIN_MAX(unsigned long)
SIMT_DEFINE_MIN_MAX(long long)
SIMT_DEFINE_MIN_MAX(unsigned long long)
#undef SIMT_DEFINE_MIN_MAX
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
