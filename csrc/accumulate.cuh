// From loaded windows to per-channel accumulators: what a thread does with its values, written once
// for the stage kernels and for the kernels that keep the data on chip.
#pragma once

#include "reduce.cuh"
#include "traversal.cuh"

namespace batchnorm_cuda {

// Statistics of the windows that a thread has at hand, in two sweeps over them: the mean, then the
// squared deviations from it, corrected by the residual that the rounded mean leaves (Chan, Golub
// and LeVeque 1983, eq. 1.7). One division serves them all. Masked lanes hold zeros. Both sweeps
// take the same windows, in batches of any size; kFull: all of a batch's windows are there, whole.
template <typename Cursor, typename acc_t>
class TwoSweeps {
 public:
  using Values = Vec<typename Cursor::scalar_t>;
  using Mask = Window<typename Cursor::index_t>;

  template <bool kFull, int kWindows>
  __device__ __forceinline__ void add_values(const Values (&vec)[kWindows],
                                             const Mask (&windows)[kWindows]) {
    acc_t batch[Cursor::kChannels] = {};
    for_each_value<kFull>(vec, windows, [&](int c, acc_t x, bool valid) {
      batch[c] += x;
      if (!Cursor::kExact) count_[c] += valid;
    });
#pragma unroll
    for (int u = 0; u < kWindows; ++u) {
      if (Cursor::kExact) count_[0] += (kFull || windows[u].hi > 0) * kLanes;
    }
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) sum_[c] += batch[c];
  }

  // Between the sweeps. The mean's rounding does no harm: the residual is taken from it as it is.
  __device__ __forceinline__ void end_values() {
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) {
      shift_[c] = sum_[c] * per_value(c);
      sum_[c] = 0;  // of the residuals, from here on
    }
  }

  template <bool kFull, int kWindows>
  __device__ __forceinline__ void add_deviations(const Values (&vec)[kWindows],
                                                 const Mask (&windows)[kWindows]) {
    acc_t residual[Cursor::kChannels] = {}, squares[Cursor::kChannels] = {};
    for_each_value<kFull>(vec, windows, [&](int c, acc_t x, bool valid) {
      const acc_t deviation = valid ? x - shift_[c] : acc_t(0);
      residual[c] += deviation;
      squares[c] += deviation * deviation;
    });
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) {
      sum_[c] += residual[c];
      m2_[c] += squares[c];
    }
  }

  __device__ __forceinline__ void merge_into(Welford<acc_t> (&stats)[Cursor::kChannels]) const {
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) {
      Welford<acc_t> batch;
      batch.count = static_cast<acc_t>(count(c));
      batch.shift = shift_[c];
      batch.mean = sum_[c] * per_value(c);
      batch.m2 = m2_[c] - sum_[c] * batch.mean;
      stats[c].merge(batch);
    }
  }

 private:
  static constexpr int kLanes = Cursor::kVecSize / Cursor::kChannels;  // per channel

  // Calls f(channel, value, valid) for the values of a batch. In exact tilings a window is there
  // or not, and all values of those that are there are valid.
  template <bool kFull, int kWindows, typename F>
  __device__ __forceinline__ static void for_each_value(const Values (&vec)[kWindows],
                                                        const Mask (&windows)[kWindows], F&& f) {
#pragma unroll
    for (int u = 0; u < kWindows; ++u) {
      if (!kFull && Cursor::kExact && windows[u].hi <= 0) continue;
#pragma unroll
      for (int l = 0; l < Cursor::kVecSize; ++l) {
        f(l / kLanes, to_acc(vec[u].lane[l]), kFull || Cursor::kExact || windows[u].valid(l));
      }
    }
  }

  // In exact tilings every channel of a thread has as many values.
  __device__ __forceinline__ int count(int c) const { return count_[Cursor::kExact ? 0 : c]; }
  __device__ __forceinline__ acc_t per_value(int c) const {
    return reciprocal(count(c) > 0 ? static_cast<acc_t>(count(c)) : acc_t(1));
  }

  int count_[Cursor::kExact ? 1 : Cursor::kChannels] = {};
  acc_t sum_[Cursor::kChannels] = {}, shift_[Cursor::kChannels] = {}, m2_[Cursor::kChannels] = {};
};

// Merges a batch into the statistics of each of the thread's channels.
template <typename Cursor, bool kFull, typename acc_t, int kWindows>
__device__ __forceinline__ void add_statistics(
    Welford<acc_t> (&stats)[Cursor::kChannels],
    const Vec<typename Cursor::scalar_t> (&vec)[kWindows],
    const Window<typename Cursor::index_t> (&windows)[kWindows]) {
  TwoSweeps<Cursor, acc_t> batch;
  batch.template add_values<kFull>(vec, windows);
  batch.end_values();
  batch.template add_deviations<kFull>(vec, windows);
  batch.merge_into(stats);
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

// The same for the five sums of the double backward. Channel by channel, so that the batch's own
// sums of one channel at a time are in registers.
template <typename Cursor, typename acc_t, int kWindows>
__device__ __forceinline__ void add_double_gradients(
    DoubleGradSums<acc_t> (&sums)[Cursor::kChannels],
    const Vec<typename Cursor::scalar_t> (&dy)[kWindows],
    const Vec<typename Cursor::scalar_t> (&ggx)[kWindows],
    const Vec<typename Cursor::scalar_t> (&x)[kWindows], const acc_t (&mean)[Cursor::kChannels]) {
  constexpr int kLanes = Cursor::kVecSize / Cursor::kChannels;
#pragma unroll
  for (int c = 0; c < Cursor::kChannels; ++c) {
    DoubleGradSums<acc_t> batch;
#pragma unroll
    for (int i = 0; i < kWindows * kLanes; ++i) {
      const int u = i / kLanes, l = c * kLanes + i % kLanes;
      const acc_t first = to_acc(dy[u].lane[l]), second = to_acc(ggx[u].lane[l]);
      const acc_t centred = to_acc(x[u].lane[l]) - mean[c];
      batch.sum_dy += first;
      batch.sum_dy_xhat += first * centred;
      batch.sum_ggx += second;
      batch.sum_ggx_xhat += second * centred;
      batch.sum_ggx_dy += second * first;
    }
    sums[c].merge(batch);
  }
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
