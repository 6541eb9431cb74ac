// What is fused to batch norm: y = relu(bn(x) + residual) in the forward pass; in the backward pass
// the gradient where the ReLU let values through, which is the gradient of the residual as well.
// Kernels are written once and call the functions here, which come in one overload for each of
// Identity (nothing is fused), FusedForward and FusedBackward (params.h).
//
// The mask holds a byte for each kVec elements of the dense output, numbered in memory order: bit
// e % kVec of byte e / kVec says that element e of the output is positive, or NaN, where the ReLU's
// gradient passes as well. A window is one byte: outputs beside a mask begin on 16-byte boundaries,
// and so does all that a fused backward works on (stages.h sees to that). In tilings that are not
// exact it may share the byte with windows of other threads.
#pragma once

#include "vec_io.cuh"

namespace batchnorm_cuda {

template <typename acc_t>
struct Identity {};

// What goes with a window through the forming of its output: the residual.
struct Nothing {};
template <typename Epilogue>
struct Operand {
  using type = Nothing;
};
template <typename scalar_t>
struct Operand<FusedForward<scalar_t>> {
  using type = Vec<scalar_t>;
};
template <typename Epilogue>
using OperandOf = typename Operand<Epilogue>::type;

// Does all that the kernel works on begin on 16-byte boundaries?
template <typename Epilogue>
inline constexpr bool kOnBoundaries = false;
template <typename scalar_t>
inline constexpr bool kOnBoundaries<FusedBackward<scalar_t>> = true;

// ---------------------------------------------------------------------------- the mask

template <typename scalar_t, typename index_t>
__device__ __forceinline__ index_t byte_of(const Window<index_t>& window) {
  constexpr int kLog2 = kVec<scalar_t> == 8 ? 3 : kVec<scalar_t> == 4 ? 2 : 1;
  return window.offset >> kLog2;
}

// Bit l is lane l's; those of lanes that are not valid say nothing.
template <typename scalar_t, typename index_t>
__device__ __forceinline__ uint32_t load_bits(const uint8_t* mask, const Window<index_t>& window,
                                              Site site = Site::current()) {
  mark_step(site);
  return window.lo < window.hi ? load_global(mask + byte_of<scalar_t>(window), site) : 0;
}

// Not exact: other threads may write other bits of the byte. The mask is zeroed before, and is a
// whole number of words.
template <bool kExact, Lanes kLanes, typename scalar_t, typename index_t>
__device__ __forceinline__ void store_bits(uint8_t* mask, const Window<index_t>& window,
                                           uint32_t bits, Site site = Site::current()) {
  mark_step(site);
  if (kLanes == Lanes::kAll ? window.hi <= 0 : window.lo >= window.hi) return;
  const index_t place = byte_of<scalar_t>(window);
  if (kExact) return store_global(mask + place, static_cast<uint8_t>(bits), site);
  bits &=
      kLanes == Lanes::kAll ? (1u << kVec<scalar_t>)-1 : (~0u << window.lo) & ~(~0u << window.hi);
  or_relaxed(reinterpret_cast<uint32_t*>(mask + (place & ~index_t{3})),
             bits << static_cast<int>(place & 3) * 8, site);
}

// ---------------------------------------------------------------------------- forward

// What rounds to zero although it is positive: the largest such value, half the smallest positive
// one. A value above it, and no other, is positive after rounding as well.
template <typename scalar_t>
inline constexpr acc_type<scalar_t> kRoundsToZero =
    std::is_same_v<scalar_t, __half>          ? 0x1p-25f
    : std::is_same_v<scalar_t, __nv_bfloat16> ? 0x1p-134f
                                              : 0;

template <bool kExact, Lanes kLanes, typename acc_t, typename index_t>
__device__ __forceinline__ Nothing load_operand(const Identity<acc_t>&, const Window<index_t>&,
                                                int64_t) {
  return {};
}
template <bool kExact, Lanes kLanes, typename scalar_t, typename index_t>
__device__ __forceinline__ Vec<scalar_t> load_operand(const FusedForward<scalar_t>& fused,
                                                      const Window<index_t>& window, int64_t numel,
                                                      Site site = Site::current()) {
  return load_window_or_zero<kLanes>(fused.residual, window, numel,
                                     kExact || fused.residual_aligned, site);
}

#ifdef BATCHNORM_CUDA_HAS_PAIRS
// Of two half or bfloat16 values: each or `lowest`, which is as wide, whichever is more, or NaN.
template <bool kBFloat16>
__device__ __forceinline__ uint32_t at_least(uint32_t bits, uint32_t lowest) {
  uint32_t result;
  if constexpr (kBFloat16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(bits), "r"(lowest));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(bits), "r"(lowest));
  }
  return result;
}

// All bits of a half that is above zero or NaN, none of another.
template <bool kBFloat16>
__device__ __forceinline__ uint32_t above_zero(uint32_t bits) {
  uint32_t result;
  if constexpr (kBFloat16) {
    asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(bits), "r"(0u));
  } else {
    asm("set.gtu.u32.f16x2 %0, %1, %2;" : "=r"(result) : "r"(bits), "r"(0u));
  }
  return result;
}
#endif

// Rounds a pair to lanes l and l + 1, no less than `lowest`, and sets bit l or l + 16 of `positive`
// where lane l is above zero or NaN. A NaN is not below anything, and stays.
template <typename scalar_t>
__device__ __forceinline__ void activate_into(Vec<scalar_t>& vec, int l,
                                              Pair<acc_type<scalar_t>> value,
                                              acc_type<scalar_t> lowest, uint32_t& positive) {
#ifdef BATCHNORM_CUDA_HAS_PAIRS
  if constexpr (sizeof(scalar_t) == 2) {  // after the rounding, which comes to the same
    constexpr bool kBFloat16 = std::is_same_v<scalar_t, __nv_bfloat16>;
    const uint32_t infinity = kBFloat16 ? 0xff80ff80 : 0xfc00fc00;  // negative
    uint32_t bits;
    round_into(vec, l, value);
    memcpy(&bits, &vec.lane[l], sizeof(bits));
    bits = at_least<kBFloat16>(bits, lowest == 0 ? 0 : infinity);
    memcpy(&vec.lane[l], &bits, sizeof(bits));
    positive |= above_zero<kBFloat16>(bits) & (1u << l | 0x20000u << l);
    return;
  }
#endif
  if (value.x < lowest) value.x = lowest;
  if (value.y < lowest) value.y = lowest;
  if (!(value.x <= kRoundsToZero<scalar_t>)) positive |= 1u << l;
  if (!(value.y <= kRoundsToZero<scalar_t>)) positive |= 2u << l;
  round_into(vec, l, value);
}

// Forms a window's output and stores it. form(l): lanes l and l + 1, in full precision.
template <bool kExact, Lanes kLanes, typename acc_t, typename Operand, typename scalar_t,
          typename index_t, typename Form>
__device__ __forceinline__ void store_output(const Identity<acc_t>&, const Operand&,
                                             scalar_t* output, const Window<index_t>& window,
                                             Form&& form, Site site = Site::current()) {
  Vec<scalar_t> vec;
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; l += 2) round_into(vec, l, form(l));
  store_window<kLanes>(output, window, vec, site);
}

// The same with the residual added and the ReLU taken, before the one rounding.
template <bool kExact, Lanes kLanes, typename scalar_t, typename index_t, typename Form>
__device__ __forceinline__ void store_output(const FusedForward<scalar_t>& fused,
                                             const Vec<scalar_t>& residual, scalar_t* output,
                                             const Window<index_t>& window, Form&& form,
                                             Site site = Site::current()) {
  Vec<scalar_t> vec;
  uint32_t positive = 0;
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; l += 2) {
    activate_into(vec, l, lanes_plus(residual, l, form(l)), fused.activation.lowest, positive);
  }
  positive |= positive >> 16;
  store_window<kLanes>(output, window, vec, site);
  if (fused.mask) store_bits<kExact, kLanes, scalar_t>(fused.mask, window, positive, site);
}

// ---------------------------------------------------------------------------- backward

// Zeros the lanes whose bit is not set.
template <typename scalar_t>
__device__ __forceinline__ void keep_lanes(Vec<scalar_t>& vec, uint32_t bits,
                                           const FusedBackward<scalar_t>&) {
  constexpr int kLanes = kVec<scalar_t>;
  if constexpr (sizeof(scalar_t) == 2) {
    // By words of two lanes: bits l and l + 1 come to bits 0 and 16, and each fills its half.
    uint32_t words[kLanes / 2];
    memcpy(words, &vec, sizeof(words));
    const uint32_t apart = (bits & 0xff) * 0x8001;
#pragma unroll
    for (int i = 0; i < kLanes / 2; ++i) words[i] &= (apart >> 2 * i & 0x10001) * 0xffff;
    memcpy(&vec, words, sizeof(words));
  } else {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      if (!(bits >> l & 1)) vec.lane[l] = 0;
    }
  }
}

// Filters a batch of windows of dy by the mask.
template <typename acc_t, typename scalar_t, typename index_t, int kWindows>
__device__ __forceinline__ void filter(const Identity<acc_t>&, Vec<scalar_t> (&)[kWindows],
                                       const Window<index_t> (&)[kWindows]) {}
template <typename scalar_t, typename index_t, int kWindows>
__device__ __forceinline__ void filter(const FusedBackward<scalar_t>& fused,
                                       Vec<scalar_t> (&dy)[kWindows],
                                       const Window<index_t> (&windows)[kWindows],
                                       Site site = Site::current()) {
  uint32_t bits[kWindows];
#pragma unroll
  for (int u = 0; u < kWindows; ++u) {
    bits[u] = load_bits<scalar_t>(fused.mask, windows[u], site);
  }
#pragma unroll
  for (int u = 0; u < kWindows; ++u) keep_lanes(dy[u], bits[u], fused);
}

// grad_input, and the filtered dy as the residual's gradient, each where it is wanted.
template <bool kExact, Lanes kLanes, typename scalar_t, typename index_t, typename Form>
__device__ __forceinline__ void store_output(const FusedBackward<scalar_t>& fused,
                                             const Vec<scalar_t>& dy, scalar_t* grad_input,
                                             const Window<index_t>& window, Form&& form,
                                             Site site = Site::current()) {
  if (grad_input) {
    store_output<kExact, kLanes>(Identity<acc_type<scalar_t>>{}, dy, grad_input, window, form,
                                 site);
  }
  if (fused.grad_residual) store_window<kLanes>(fused.grad_residual, window, dy, site);
}

}  // namespace batchnorm_cuda
