// From loaded windows to per-channel accumulators: what a thread does with its values, written once
// for the stage kernels and for the kernels that keep the data on chip.
#pragma once

#include "reduce.cuh"
#include "traversal.cuh"

namespace batchnorm_cuda {

// Calls f(value) for the valid values of channel c in a batch of windows. kFull: all are valid.
template <typename Cursor, bool kFull, int kWindows, typename F>
__device__ __forceinline__ void for_each_value(
    const Vec<typename Cursor::scalar_t> (&vec)[kWindows],
    const Window<typename Cursor::index_t> (&windows)[kWindows], int c, F&& f) {
  constexpr int kLanes = Cursor::kVecSize / Cursor::kChannels;  // lanes per channel
#pragma unroll
  for (int u = 0; u < kWindows; ++u) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      const int lane = c * kLanes + l;
      const bool valid = kFull || (Cursor::kExact ? windows[u].hi > 0 : windows[u].valid(lane));
      f(to_acc(vec[u].lane[lane]), valid);
    }
  }
}

// Merges a batch into the statistics of each of the thread's channels. The batch's mean and M2 are
// taken in two passes over the registers, corrected by the residual that the rounded mean leaves
// (Chan, Golub and LeVeque 1983, eq. 1.7); one division serves the batch. Masked lanes hold zeros.
template <typename Cursor, bool kFull, typename acc_t, int kWindows>
__device__ __forceinline__ void add_statistics(
    Welford<acc_t> (&stats)[Cursor::kChannels],
    const Vec<typename Cursor::scalar_t> (&vec)[kWindows],
    const Window<typename Cursor::index_t> (&windows)[kWindows]) {
  constexpr int kLanes = Cursor::kVecSize / Cursor::kChannels;
  int present = kWindows;  // exact tiling: a window is there or not
  if (!kFull && Cursor::kExact) {
    present = 0;
#pragma unroll
    for (int u = 0; u < kWindows; ++u) present += windows[u].hi > 0;
  }
#pragma unroll
  for (int c = 0; c < Cursor::kChannels; ++c) {
    Welford<acc_t> batch;
    acc_t sum = 0;
    int count = present * kLanes;
    if (!kFull && !Cursor::kExact) count = 0;
    for_each_value<Cursor, kFull>(vec, windows, c, [&](acc_t x, bool valid) {
      sum += x;
      if (!kFull && !Cursor::kExact) count += valid;
    });
    batch.count = static_cast<acc_t>(count);
    // Its rounding does no harm: the residual is taken from the shift as it came out.
    const acc_t per_value =
        kFull ? acc_t(1) / (kWindows * kLanes) : reciprocal(count > 0 ? batch.count : acc_t(1));
    batch.shift = sum * per_value;
    acc_t residual = 0;
    for_each_value<Cursor, kFull>(vec, windows, c, [&](acc_t x, bool valid) {
      const acc_t deviation = valid ? x - batch.shift : acc_t(0);
      residual += deviation;
      batch.m2 += deviation * deviation;
    });
    batch.mean = residual * per_value;
    batch.m2 -= residual * batch.mean;
    stats[c].merge(batch);
  }
}

// Merges a batch into the two sums of each channel, Σ dy and Σ dy·(x - mean). Masked lanes hold
// zeros in both tensors, which add nothing unless the channel's own mean is not finite. The batch
// is summed on its own first: fewer additions at full magnitude.
template <typename Cursor, typename acc_t, int kWindows>
__device__ __forceinline__ void add_gradients(GradSums<acc_t> (&sums)[Cursor::kChannels],
                                              const Vec<typename Cursor::scalar_t> (&dy)[kWindows],
                                              const Vec<typename Cursor::scalar_t> (&x)[kWindows],
                                              const acc_t (&mean)[Cursor::kChannels]) {
  constexpr int kLanes = Cursor::kVecSize / Cursor::kChannels;
  GradSums<acc_t> batch[Cursor::kChannels];
#pragma unroll
  for (int u = 0; u < kWindows; ++u) {
#pragma unroll
    for (int l = 0; l < Cursor::kVecSize; ++l) {
      const int c = l / kLanes;
      const acc_t grad = to_acc(dy[u].lane[l]);
      batch[c].sum_dy += grad;
      batch[c].sum_dy_xhat += grad * (to_acc(x[u].lane[l]) - mean[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < Cursor::kChannels; ++c) sums[c].merge(batch[c]);
}

// Merges the accumulators of all threads of the block that serve the same channels; the result is
// in the threads whose Cursor::member() is 0. Every thread of the block must call.
template <typename Cursor, typename Acc, typename acc_t>
__device__ __forceinline__ void reduce_members(Acc (&acc)[Cursor::kChannels], acc_t* shared) {
  if constexpr (Cursor::kChannels == 1) {
    acc[0] = group_reduce(acc[0], blockDim.x, shared);
  } else {
    column_reduce(acc, shared);
  }
}

}  // namespace batchnorm_cuda
