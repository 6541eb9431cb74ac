// From loaded windows to per-channel accumulators: what a thread does with its values, written once
// for the stage kernels and for the kernels that keep the data on chip.
#pragma once

#include "reduce.cuh"
#include "traversal.cuh"

namespace batchnorm_cuda {

// Lanes are added up in pairs (pair.cuh). Along S, where all lanes are of one channel, the pairs
// are the even and the odd lanes, which are added to each other once at the end of a batch; else a
// pair is two channels. The order of all additions is the same on every architecture.
template <typename Cursor>
inline constexpr int kPairs = Cursor::kChannels > 1 ? Cursor::kChannels / 2 : 1;

// What is known of the windows of a batch.
enum class Batched {
  kFull,     // all are there, and whole
  kPresent,  // they are whole or absent
  kMasked,   // some lanes of them are not valid, and zero
};

// Calls f(window, lane) for the first lanes of pair p in a batch: a pair at a time, so that the
// batch's own sums of one pair are in registers.
template <typename Cursor, Batched kBatched, int kWindows, typename F>
__device__ __forceinline__ void for_each_of_pair(
    int p, const Window<typename Cursor::index_t> (&windows)[kWindows], F&& f) {
#pragma unroll
  for (int u = 0; u < kWindows; ++u) {
    if (kBatched == Batched::kPresent && windows[u].hi <= 0) continue;
#pragma unroll
    for (int l = 0; l < Cursor::kVecSize; l += 2) {
      if (Cursor::channel_of(l) / 2 == p) f(u, l);
    }
  }
}

// Statistics of a batch of windows that a thread has in registers, in two sweeps over them: the
// mean, then the squared deviations from it, corrected by the residual that the rounded mean leaves
// (Chan, Golub and LeVeque 1983, eq. 1.7). One division serves them all. kApart: the thread's
// channels may have different numbers of values.
template <typename Cursor, typename acc_t, bool kApart>
class TwoSweeps {
 public:
  using Values = Vec<typename Cursor::scalar_t>;
  using Mask = Window<typename Cursor::index_t>;

  template <Batched kBatched, int kWindows>
  __device__ __forceinline__ void add_values(const Values (&vec)[kWindows],
                                             const Mask (&windows)[kWindows]) {
#pragma unroll
    for (int p = 0; p < kPairs<Cursor>; ++p) {
      for_each_of_pair<Cursor, kBatched>(p, windows, [&](int u, int l) {
        sum_[p] = lanes_plus(vec[u], l, sum_[p]);
        if (!kApart) return;
        count_[l] += windows[u].valid(l);
        count_[l + 1] += windows[u].valid(l + 1);
      });
    }
#pragma unroll
    for (int u = 0; u < kWindows; ++u) {
      if (kApart) continue;
      if (kBatched == Batched::kMasked) {
        const int lanes = windows[u].hi - windows[u].lo;
        count_[0] += lanes > 0 ? lanes : 0;
      } else {
        count_[0] += (kBatched == Batched::kFull || windows[u].hi > 0) * kLanes;
      }
    }
  }

  // Between the sweeps. The mean's rounding does no harm: the residual is taken from it as it is.
  __device__ __forceinline__ void end_values() {
#pragma unroll
    for (int p = 0; p < kPairs<Cursor>; ++p) {
      if (Cursor::kChannels == 1) sum_[p] = both(sum_[p].x + sum_[p].y);
      shift_[p] = sum_[p] * per_value(p);
      sum_[p] = {};  // of the residuals, from here on
    }
  }

  template <Batched kBatched, int kWindows>
  __device__ __forceinline__ void add_deviations(const Values (&vec)[kWindows],
                                                 const Mask (&windows)[kWindows]) {
#pragma unroll
    for (int p = 0; p < kPairs<Cursor>; ++p) {
      for_each_of_pair<Cursor, kBatched>(p, windows, [&](int u, int l) {
        Pair<acc_t> deviation = lanes_plus(vec[u], l, -shift_[p]);
        if (kBatched == Batched::kMasked) {
          if (!windows[u].valid(l)) deviation.x = 0;
          if (!windows[u].valid(l + 1)) deviation.y = 0;
        }
        sum_[p] = sum_[p] + deviation;
        m2_[p] = fused_multiply_add(deviation, deviation, m2_[p]);
      });
    }
  }

  __device__ __forceinline__ void merge_into(Welford<acc_t> (&stats)[Cursor::kChannels]) const {
    if constexpr (Cursor::kChannels == 1) {
      stats[0].merge(channel({sum_[0].x + sum_[0].y, shift_[0].x, m2_[0].x + m2_[0].y}, 0));
    } else if constexpr (!kApart) {
      merge_pairs(stats);
    } else {
#pragma unroll
      for (int p = 0; p < kPairs<Cursor>; ++p) {
        stats[2 * p].merge(channel({sum_[p].x, shift_[p].x, m2_[p].x}, 2 * p));
        stats[2 * p + 1].merge(channel({sum_[p].y, shift_[p].y, m2_[p].y}, 2 * p + 1));
      }
    }
  }

 private:
  static constexpr int kLanes = Cursor::kVecSize / Cursor::kChannels;  // per channel

  struct Sums {
    acc_t residual, shift, m2;
  };
  __device__ __forceinline__ Welford<acc_t> channel(const Sums& sums, int lane) const {
    Welford<acc_t> batch;
    batch.count = static_cast<acc_t>(count_[count_of(lane)]);
    batch.shift = sums.shift;
    batch.mean = product(sums.residual, per_value_of(lane));
    batch.m2 = fused_multiply_add(-sums.residual, batch.mean, sums.m2);
    return batch;
  }

  // Welford::merge of two channels at once: a thread's channels have the same count throughout.
  __device__ __forceinline__ void merge_pairs(Welford<acc_t> (&stats)[Cursor::kChannels]) const {
    const MergeWeights<acc_t> weights(stats[0].count, static_cast<acc_t>(count_[0]));
#pragma unroll
    for (int p = 0; p < kPairs<Cursor>; ++p) {
      Welford<acc_t>&a = stats[2 * p], &b = stats[2 * p + 1];
      a.begin(shift_[p].x, weights);
      b.begin(shift_[p].y, weights);
      const Pair<acc_t> mean = sum_[p] * per_value(p);
      Moments<Pair<acc_t>> merged{{a.mean, b.mean}, {a.m2, b.m2}};
      merged.merge((shift_[p] - Pair<acc_t>{a.shift, b.shift}) + (mean - merged.mean),
                   fused_multiply_add(-sum_[p], mean, m2_[p]), both(weights.fraction),
                   both(weights.product));
      a.end(merged.mean.x, merged.m2.x, weights);
      b.end(merged.mean.y, merged.m2.y, weights);
    }
  }

  __device__ __forceinline__ static constexpr int count_of(int lane) { return kApart ? lane : 0; }
  __device__ __forceinline__ Pair<acc_t> per_value(int p) const {
    return {per_value_of(2 * p), per_value_of(2 * p + 1)};
  }
  __device__ __forceinline__ acc_t per_value_of(int lane) const {
    const int count = count_[count_of(lane)];
    return reciprocal(count > 0 ? static_cast<acc_t>(count) : acc_t(1));
  }

  int count_[kApart ? Cursor::kChannels : 1] = {};
  Pair<acc_t> sum_[kPairs<Cursor>] = {}, shift_[kPairs<Cursor>] = {}, m2_[kPairs<Cursor>] = {};
};

// Merges a batch into the statistics of each of the thread's channels. Masked batches come last.
template <typename Cursor, Batched kBatched, typename acc_t, int kWindows>
__device__ __forceinline__ void add_statistics(
    Welford<acc_t> (&stats)[Cursor::kChannels],
    const Vec<typename Cursor::scalar_t> (&vec)[kWindows],
    const Window<typename Cursor::index_t> (&windows)[kWindows]) {
  TwoSweeps<Cursor, acc_t, kBatched == Batched::kMasked && (Cursor::kChannels > 1)> batch;
  batch.template add_values<kBatched>(vec, windows);
  batch.end_values();
  batch.template add_deviations<kBatched>(vec, windows);
  batch.merge_into(stats);
}

// Merges a batch of windows into the sums of each channel. add(pair, u, l) adds lanes l and l + 1
// of window u to the sums of their channels. The batch is summed on its own first, for fewer
// additions at full magnitude, unless it has only one value a channel.
template <typename Cursor, int kWindows, template <typename> class Sums, typename acc_t,
          typename Add>
__device__ __forceinline__ void add_sums(Sums<acc_t> (&sums)[Cursor::kChannels], Add&& add) {
  constexpr bool kOneValue = kWindows == 1 && Cursor::kChannels > 1;
#pragma unroll
  for (int p = 0; p < kPairs<Cursor>; ++p) {
    Sums<acc_t>&a = sums[2 * p], &b = sums[Cursor::kChannels == 1 ? 0 : 2 * p + 1];
    Sums<Pair<acc_t>> batch;
#pragma unroll
    for (int f = 0; kOneValue && f < Sums<acc_t>::kFields; ++f) {
      batch.field(f) = {a.field(f), b.field(f)};
    }
#pragma unroll
    for (int u = 0; u < kWindows; ++u) {
#pragma unroll
      for (int l = 0; l < Cursor::kVecSize; l += 2) {
        if (Cursor::channel_of(l) / 2 == p) add(batch, u, l);
      }
    }
#pragma unroll
    for (int f = 0; f < Sums<acc_t>::kFields; ++f) {
      Pair<acc_t> total = batch.field(f);
      if constexpr (Cursor::kChannels == 1) {
        a.field(f) += total.x + total.y;
      } else {
        if (!kOneValue) total = Pair<acc_t>{a.field(f), b.field(f)} + total;
        a.field(f) = total.x;
        b.field(f) = total.y;
      }
    }
  }
}

// x - mean of lanes l and l + 1.
template <typename Cursor, typename acc_t>
__device__ __forceinline__ Pair<acc_t> centred(const Vec<typename Cursor::scalar_t>& x, int l,
                                               const acc_t (&mean)[Cursor::kChannels]) {
  return lanes_plus(x, l, {-mean[Cursor::channel_of(l)], -mean[Cursor::channel_of(l + 1)]});
}

// Σ dy and Σ dy·(x - mean). Masked lanes hold zeros in both tensors, which add nothing unless the
// channel's own mean is not finite.
template <typename Cursor, typename acc_t, int kWindows>
__device__ __forceinline__ void add_gradients(GradSums<acc_t> (&sums)[Cursor::kChannels],
                                              const Vec<typename Cursor::scalar_t> (&dy)[kWindows],
                                              const Vec<typename Cursor::scalar_t> (&x)[kWindows],
                                              const acc_t (&mean)[Cursor::kChannels]) {
  add_sums<Cursor, kWindows>(sums, [&](GradSums<Pair<acc_t>>& pair, int u, int l) {
    pair.add(lanes(dy[u], l), centred<Cursor>(x[u], l, mean));
  });
}

// The same for the five sums of the double backward.
template <typename Cursor, typename acc_t, int kWindows>
__device__ __forceinline__ void add_double_gradients(
    DoubleGradSums<acc_t> (&sums)[Cursor::kChannels],
    const Vec<typename Cursor::scalar_t> (&dy)[kWindows],
    const Vec<typename Cursor::scalar_t> (&ggx)[kWindows],
    const Vec<typename Cursor::scalar_t> (&x)[kWindows], const acc_t (&mean)[Cursor::kChannels]) {
  add_sums<Cursor, kWindows>(sums, [&](DoubleGradSums<Pair<acc_t>>& pair, int u, int l) {
    pair.add(lanes(dy[u], l), lanes(ggx[u], l), centred<Cursor>(x[u], l, mean));
  });
}

// Merges the accumulators of all threads of the block that serve the same channels; the result is
// in the threads whose Cursor::member() is 0. Every thread of the block must call.
template <typename Cursor, typename Acc, typename acc_t>
__device__ __forceinline__ void reduce_members(Acc (&acc)[Cursor::kChannels], acc_t* shared) {
  if constexpr (Cursor::kChannels == 1) {
    acc[0] = group_reduce(acc[0], blockDim.x, shared);
  } else {
    column_reduce<Cursor::kExact>(acc, shared);
  }
}

}  // namespace batchnorm_cuda
