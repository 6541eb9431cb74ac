// What is fused to batch norm: y = act(bn(x) + residual) in the forward pass, with a piecewise
// linear activation (activation.h); in the backward pass the gradient of what it was applied to,
// which is the gradient of the residual as well. Kernels are written once and call the functions
// here, which come in one overload for each of Identity (nothing is fused), FusedForward and
// FusedBackward (params.h).
//
// The mask holds a byte for each kVec elements of the dense output, numbered in memory order: bit
// e % kVec of byte e / kVec says that the activation's slope is 1 at element e, or that it is NaN.
// A window is one byte: outputs beside a mask begin on 16-byte boundaries, and so does all that a
// fused backward works on (stages.h sees to that). In tilings that are not exact it may share the
// byte with windows of other threads.
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
__device__ __forceinline__ void bound_into(Vec<scalar_t>& vec, int l,
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

// A window in full precision, and one that is rounded, with the bits of its lanes.
template <typename scalar_t>
struct Values {
  acc_type<scalar_t> lane[kVec<scalar_t>];
};
struct Activated {
  uint4 bits;  // words, as loaded and stored: lanes of 16 bits would be put together at every use
  uint32_t passed;
};

// Any activation of a window. Out of line, so that it is in a kernel once, and takes no registers
// from loops that have a ReLU in line.
template <typename scalar_t>
__device__ __attribute__((noinline)) Activated activated(Values<scalar_t> values,
                                                         acc_type<scalar_t> below,
                                                         acc_type<scalar_t> highest) {
  Activated result{};
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; ++l) {
    acc_type<scalar_t>& y = values.lane[l];  // a NaN is not beyond anything, and stays
    if (y < 0) y = below == 0 ? 0 : y * below;
    if (y > highest) y = highest;
  }
  const Vec<scalar_t> vec = round_to<scalar_t>(values.lane);
  memcpy(&result.bits, &vec, sizeof(vec));
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; ++l) {
    const acc_type<scalar_t> y = to_acc(vec.lane[l]);
    if (!(y <= 0) && !(y >= highest)) result.passed |= 1u << l;
  }
  return result;
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

// The same with the residual added and the activation taken, before the one rounding.
template <bool kExact, Lanes kLanes, typename scalar_t, typename index_t, typename Form>
__device__ __forceinline__ void store_output(const FusedForward<scalar_t>& fused,
                                             const Vec<scalar_t>& residual, scalar_t* output,
                                             const Window<index_t>& window, Form&& form,
                                             Site site = Site::current()) {
  Values<scalar_t> values;
#pragma unroll
  for (int l = 0; l < kVec<scalar_t>; l += 2) {
    const Pair<acc_type<scalar_t>> pair = lanes_plus(residual, l, form(l));
    values.lane[l] = pair.x;
    values.lane[l + 1] = pair.y;
  }
  Vec<scalar_t> vec;
  Activated y{};
  if (fused.activation.only_lowest) {  // the same for all threads
#pragma unroll
    for (int l = 0; l < kVec<scalar_t>; l += 2) {
      bound_into(vec, l, {values.lane[l], values.lane[l + 1]}, fused.activation.lowest, y.passed);
    }
    memcpy(&y.bits, &vec, sizeof(vec));
    y.passed |= y.passed >> 16;
  } else {
    y = activated(values, fused.activation.below, fused.activation.highest);
  }
  memcpy(&vec, &y.bits, sizeof(vec));
  store_window<kLanes>(output, window, vec, site);
  if (fused.mask) store_bits<kExact, kLanes, scalar_t>(fused.mask, window, y.passed, site);
}

// ---------------------------------------------------------------------------- backward

// Both values of a word times the slope, in one rounding but for what underflows.
template <typename scalar_t>
__device__ __forceinline__ uint32_t scaled(uint32_t bits, const Slope<float>& slope) {
  using Two = std::conditional_t<std::is_same_v<scalar_t, __half>, __half2, __nv_bfloat162>;
  Two values, high, low;
  memcpy(&values, &bits, sizeof(bits));
  memcpy(&high, &slope.high, sizeof(bits));
  memcpy(&low, &slope.low, sizeof(bits));
  values = __hfma2(values, high, __hmul2(values, low));
  memcpy(&bits, &values, sizeof(bits));
  return bits;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Has no arithmetic of bfloat16. Out of line: rounding takes registers that kernels do not have.
template <>
__device__ __attribute__((noinline)) uint32_t scaled<__nv_bfloat16>(uint32_t bits,
                                                                    const Slope<float>& slope) {
  Vec<__nv_bfloat16> vec;
  memcpy(&vec, &bits, sizeof(bits));
  round_into(vec, 0, lanes(vec, 0) * both(slope.value));
  memcpy(&bits, &vec, sizeof(bits));
  return bits;
}
#endif

// Two of four lanes, the first or the last: all bits of each where the highest bit of its byte of
// `signs` is set.
__device__ __forceinline__ uint32_t two_masks(uint32_t signs, bool last) {
#ifdef __CUDA_ARCH__
  uint32_t masks;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(masks) : "r"(signs), "r"(last ? 0xbbaa : 0x9988));
  return masks;
#else
  const auto mask = [&](int lane) { return signs >> (8 * lane + 7) & 1 ? 0xffffu : 0; };
  return last ? mask(2) | mask(3) << 16 : mask(0) | mask(1) << 16;
#endif
}

// Multiplies the lanes whose bit is not set by the activation's slope there; 0 makes zero of NaN,
// too.
template <typename scalar_t>
__device__ __forceinline__ void keep_lanes(Vec<scalar_t>& vec, uint32_t bits,
                                           const Slope<acc_type<scalar_t>>& below) {
  constexpr int kLanes = kVec<scalar_t>;
  if constexpr (sizeof(scalar_t) == 2) {
    uint32_t words[kLanes / 2];
    memcpy(words, &vec, sizeof(words));
    // Bits l to l + 3 to the highest of the bytes of a word, without a carry.
    const auto signs = [&](int l) { return (bits >> l & 15) * 0x10204080; };
#pragma unroll
    for (int i = 0; i < kLanes / 2; ++i) {
      const uint32_t passed = two_masks(signs(i / 2 * 4), i % 2 == 1);
      words[i] = (words[i] & passed) | (scaled<scalar_t>(words[i], below) & below.kept & ~passed);
    }
    memcpy(&vec, words, sizeof(words));
  } else {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      if (!(bits >> l & 1)) vec.lane[l] = below.value == 0 ? 0 : vec.lane[l] * below.value;
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
  for (int u = 0; u < kWindows; ++u) keep_lanes(dy[u], bits[u], fused.below);
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
