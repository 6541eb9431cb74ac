// Global access to activations and parameters: every load and store of the kernels is here.
//
// A window is 16 bytes of a tensor, kVec elements, of which lanes [lo, hi) belong to the caller.
// Full windows move as one 16-byte access. At the head and tail of a run a load still takes the
// whole window (the foreign lanes are real elements of neighbours), a store writes its own lanes
// only, because the neighbours' lanes belong to other threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "../params.h"
#include "pair.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
inline constexpr int kVec = kWindowBytes / static_cast<int>(sizeof(scalar_t));

__device__ __forceinline__ float to_acc(float value) { return value; }
__device__ __forceinline__ double to_acc(double value) { return value; }
__device__ __forceinline__ float to_acc(__half value) { return __half2float(value); }
// The upper half of a float. Spelt out: two of them in a register are then taken apart in place,
// where the conversion's own 16-bit values would take registers.
__device__ __forceinline__ float to_acc(__nv_bfloat16 value) {
  uint16_t half;
  memcpy(&half, &value, sizeof(half));
  const uint32_t bits = uint32_t{half} << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t from_acc(acc_type<scalar_t> value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <typename scalar_t>
struct alignas(kWindowBytes) Vec {
  scalar_t lane[kVec<scalar_t>];
};

// Lanes l and l + 1, l even, in full precision, and the sum of each and of a value of its own.
template <typename scalar_t>
__device__ __forceinline__ Pair<acc_type<scalar_t>> lanes(const Vec<scalar_t>& vec, int l) {
  return {to_acc(vec.lane[l]), to_acc(vec.lane[l + 1])};
}
template <typename scalar_t>
__device__ __forceinline__ Pair<acc_type<scalar_t>> lanes_plus(
    const Vec<scalar_t>& vec, int l, const Pair<acc_type<scalar_t>>& value) {
#ifdef BATCHNORM_CUDA_HAS_PAIRS
  if constexpr (sizeof(scalar_t) == 2) {
    uint32_t bits;
    memcpy(&bits, &vec.lane[l], sizeof(bits));
    return add_halves<std::is_same_v<scalar_t, __nv_bfloat16>>(bits, value);
  }
#endif
  return lanes(vec, l) + value;
}

template <typename index_t>
struct Window {
  index_t offset;  // of lane 0, in elements; negative or past the end where lanes are masked
  int lo, hi;      // lanes [lo, hi) are valid; empty where hi <= lo
  __device__ bool valid(int lane) const { return lane >= lo && lane < hi; }
};

// What is known of the lanes of a window.
enum class Lanes {
  kAll,   // it is whole, or absent: hi is 0
  kKept,  // the same of what is in memory, but a store writes its own lanes; what a load leaves in
          // others is of neighbours, and nothing comes of it
  kMasked,  // it may reach beyond the tensor; a load leaves zeros where lanes are not valid
};

// `aligned`: the windows are on 16-byte boundaries of this tensor; else a lane is read at a time.
template <Lanes kLanes, typename scalar_t, typename index_t>
__device__ __forceinline__ Vec<scalar_t> load_window(const scalar_t* base,
                                                     const Window<index_t>& window, int64_t numel,
                                                     bool aligned, Site site = Site::current()) {
  mark_step(site);
  constexpr int kVecSize = kVec<scalar_t>;
  Vec<scalar_t> vec;
  uint4 bits = {0, 0, 0, 0};
  constexpr bool kMasked = kLanes == Lanes::kMasked;
  const bool present = kMasked ? window.lo < window.hi : window.hi > 0;
  const bool inside =
      !kMasked || (window.offset >= 0 && window.offset + kVecSize <= static_cast<index_t>(numel));
  const bool whole = present && aligned && inside;
  if (whole) bits = load_global(reinterpret_cast<const uint4*>(base + window.offset), site);
  memcpy(&vec, &bits, sizeof(bits));
  if (!kMasked && (whole || !present)) return vec;
#pragma unroll
  for (int l = 0; l < kVecSize; ++l) {
    const bool valid = !kMasked || window.valid(l);
    if (!valid) {
      vec.lane[l] = from_acc<scalar_t>(0);
    } else if (!whole) {
      vec.lane[l] = load_global(base + window.offset + l, site);
    }
  }
  // Lanes of 16 bits, put together one by one, would each be kept in a register of their own.
  memcpy(&bits, &vec, sizeof(bits));
  forget_derived(bits);
  memcpy(&vec, &bits, sizeof(bits));
  return vec;
}

// Zeros where there is no such tensor: as of an empty window, so that 16 bytes stay one value.
template <Lanes kLanes, typename scalar_t, typename index_t>
__device__ __forceinline__ Vec<scalar_t> load_window_or_zero(const scalar_t* base,
                                                             Window<index_t> window, int64_t numel,
                                                             bool aligned,
                                                             Site site = Site::current()) {
  if (!base) window.hi = window.lo = 0;
  return load_window<kLanes>(base, window, numel, aligned, site);
}

// Lanes [lo, hi) of a window, in the fewest accesses: every aligned group of 8, 4 or 2 bytes and
// more that is valid as a whole, and of which no larger group is.
template <int kGroup, typename scalar_t>
__device__ __forceinline__ void store_lanes(scalar_t* window, int lo, int hi,
                                            const Vec<scalar_t>& vec, Site site) {
  using Group =
      std::conditional_t<kGroup * sizeof(scalar_t) == 8, uint2,
                         std::conditional_t<kGroup * sizeof(scalar_t) == 4, uint32_t, uint16_t>>;
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; l += kGroup) {
    const int larger = l / (2 * kGroup) * 2 * kGroup;
    const bool whole = 4 * kGroup <= kVec<scalar_t> && lo <= larger && larger + 2 * kGroup <= hi;
    if (whole || l < lo || l + kGroup > hi) continue;
    Group bits;
    memcpy(&bits, &vec.lane[l], sizeof(bits));
    store_global(reinterpret_cast<Group*>(window + l), bits, site);
  }
  if constexpr (kGroup > 1) store_lanes<kGroup / 2>(window, lo, hi, vec, site);
}

template <Lanes kLanes, typename scalar_t, typename index_t>
__device__ __forceinline__ void store_window(scalar_t* base, const Window<index_t>& window,
                                             const Vec<scalar_t>& vec,
                                             Site site = Site::current()) {
  mark_step(site);
  if (kLanes == Lanes::kAll ? window.hi > 0 : window.lo <= 0 && window.hi >= kVec<scalar_t>) {
    uint4 bits;
    memcpy(&bits, &vec, sizeof(bits));
    store_global(reinterpret_cast<uint4*>(base + window.offset), bits, site);
  } else if (kLanes != Lanes::kAll) {
    store_lanes<kVec<scalar_t> / 2>(base + window.offset, window.lo, window.hi, vec, site);
  }
}

// Rounds two values to lanes l and l + 1, at once where the hardware packs pairs.
template <typename scalar_t>
__device__ __forceinline__ void round_into(Vec<scalar_t>& vec, int l,
                                           const Pair<acc_type<scalar_t>>& value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    const __half2 pair = __floats2half2_rn(value.x, value.y);
    memcpy(&vec.lane[l], &pair, sizeof(pair));
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(value.x, value.y);
    memcpy(&vec.lane[l], &pair, sizeof(pair));
  } else {
    vec.lane[l] = value.x;
    vec.lane[l + 1] = value.y;
  }
}

template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t> round_to(
    const acc_type<scalar_t> (&value)[kVec<scalar_t>]) {
  Vec<scalar_t> vec;
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; l += 2) round_into(vec, l, {value[l], value[l + 1]});
  return vec;
}

// A parameter is of the activations' type or float (checks.cpp). `scalar_t` is that type, or where
// a kernel serves all that accumulate in float, OfFloat.
struct OfFloat {};
template <typename acc_t>
using ParamOf = std::conditional_t<std::is_same_v<acc_t, float>, OfFloat, acc_t>;

// f(pointer to the parameter's values).
template <typename scalar_t, typename F>
__device__ __forceinline__ auto with_param(const ParamPointer& param, F&& f) {
  if (param.dtype == Dtype::kFloat) return f(static_cast<float*>(param.data));
  if constexpr (std::is_same_v<scalar_t, OfFloat>) {
    if (param.dtype == Dtype::kHalf) return f(static_cast<__half*>(param.data));
    return f(static_cast<__nv_bfloat16*>(param.data));
  } else {
    return f(static_cast<scalar_t*>(param.data));
  }
}

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ acc_t load_param(const ParamPointer& param, int64_t i,
                                            Site site = Site::current()) {
  return with_param<scalar_t>(param, [&](const auto* data) {
    return static_cast<acc_t>(to_acc(load_global(data + i, site)));
  });
}

// The parameter, or a neutral value where it is absent.
template <typename scalar_t, typename acc_t = acc_type<scalar_t>>
__device__ __forceinline__ acc_t load_param_or(const ParamPointer& param, int64_t i, acc_t absent,
                                               Site site = Site::current()) {
  return param.data ? load_param<scalar_t, acc_t>(param, i, site) : absent;
}

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void store_param(const ParamPointer& param, int64_t i, acc_t value,
                                            Site site = Site::current()) {
  with_param<scalar_t>(param, [&](auto* data) {
    using param_t = std::remove_pointer_t<decltype(data)>;
    store_global(data + i, from_acc<param_t>(static_cast<acc_type<param_t>>(value)), site);
  });
}

}  // namespace batchnorm_cuda
