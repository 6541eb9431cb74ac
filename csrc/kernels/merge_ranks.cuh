// Merges what the ranks of a process group have gathered: their moments into the statistics of the
// whole batch, with the running-statistics update, and their sums of the backward pass.
//
// The results are the same to the bit whatever the order of the ranks. Counts are integers. All
// else is a sum of one term per rank, taken in fixed point: the terms are rounded to integers in
// units that only their largest magnitude decides, and integers add up exactly (docs/sync.md).
//
// A thread serves one column; the rows of neighbouring threads are neighbours in memory.
#pragma once

#include "../rank_params.h"
#include "launch.cuh"
#include "statistics.cuh"

namespace batchnorm_cuda {

// Bits of a term, and of the sum: one is left for the sign and one for the rounding of the terms.
constexpr int kSumBits = 62;
// Smaller peaks are taken for this one, so that the unit and its reciprocal are normal numbers.
constexpr int kLeastExponent = -900;

// The sum of term(0) ... term(ranks - 1). A NaN, or infinities of both signs, give NaN; infinities
// of one sign give that.
template <typename F>
__device__ __forceinline__ double sum_over_ranks(int ranks, F&& term) {
  double peak = 0, special = 0;
#pragma unroll 4
  for (int r = 0; r < ranks; ++r) {
    const double value = term(r);
    if (std::isfinite(value)) {
      peak = fmax(peak, fabs(value));
    } else {
      special += value;
    }
  }
  if (std::isnan(special)) return nan("");  // one NaN: which payload wins depends on the order
  if (special != 0) return special;
  int exponent, rank_bits;
  frexp(peak, &exponent);                         // peak < 2^exponent
  frexp(static_cast<double>(ranks), &rank_bits);  // ranks < 2^rank_bits
  const int unit = kSumBits - rank_bits - max(exponent, kLeastExponent);
  const double scale = ldexp(1.0, unit);
  int64_t sum = 0;
#pragma unroll 4
  for (int r = 0; r < ranks; ++r) sum += llrint(term(r) * scale);
  return static_cast<double>(sum) * ldexp(1.0, -unit);
}

template <typename acc_t>
__device__ __forceinline__ double count_of(const MergeRanksParams<acc_t>& p, int rank) {
  return static_cast<double>(load_global(p.row(rank).count()));
}

// Mean and M2 of a channel over all ranks, by Chan's formula for any number of sets:
// mean = Σ n_r mean_r / n and M2 = Σ M2_r + n_r (mean_r - mean)^2.
template <typename acc_t>
__device__ __forceinline__ Welford<acc_t> merge_channel(const MergeRanksParams<acc_t>& p,
                                                        int64_t channel, double total) {
  const double mean =
      sum_over_ranks(p.ranks,
                     [&](int r) {
                       return count_of(p, r) *
                              static_cast<double>(load_global(p.row(r).mean() + channel));
                     }) /
      fmax(total, 1.0);
  const double m2 = sum_over_ranks(p.ranks, [&](int r) {
    const double count = count_of(p, r);
    const double delta = static_cast<double>(load_global(p.row(r).mean() + channel)) - mean;
    const auto within = static_cast<double>(load_global(p.row(r).m2() + channel));
    // Fused by hand: a compiler that fuses in one copy of an unrolled loop only would tell ranks
    // apart.
    return count > 0 ? fused_multiply_add(delta, delta * count, within) : within;
  });
  Welford<acc_t> merged;
  merged.shift = static_cast<acc_t>(mean);
  merged.m2 = static_cast<acc_t>(m2);
  return merged;
}

// One block an SM, as for merge_kernel.
template <typename acc_t>
__global__ void __launch_bounds__(kRankMergeThreads, 1)
    merge_ranks_kernel(const MergeRanksParams<acc_t> p) {
  int64_t total = 0;
  for (int r = 0; r < p.ranks; ++r) total += load_global(p.row(r).count());
  StatisticsOutput<acc_t> statistics = p.statistics;
  statistics.count = total > 0 ? total : 1;
  if (total < 2) {  // no variance to learn from: the running statistics stay as they are
    statistics.momentum = 0;
    statistics.arrival_shift = 0;  // the batch counts all the same
  }
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (thread == 0) store_global(p.count, total);
  for (int64_t channel = thread; channel < statistics.c;
       channel += int64_t{gridDim.x} * blockDim.x) {
    const Welford<acc_t> merged = merge_channel(p, channel, static_cast<double>(total));
    const acc_t momentum = count_batch(statistics, 1, channel == 0);
    ChannelStatistics<acc_t>(statistics, merged)
        .template save<ParamOf<acc_t>>(statistics, channel, momentum);
  }
}

template <typename acc_t>
__global__ void __launch_bounds__(kRankMergeThreads)
    sum_ranks_kernel(const SumRanksParams<acc_t> p) {
  for (int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; column < p.columns;
       column += int64_t{gridDim.x} * blockDim.x) {
    const double sum = sum_over_ranks(p.ranks, [&](int r) {
      return static_cast<double>(load_global(p.gathered + r * p.columns + column));
    });
    store_global(p.sums + column, static_cast<acc_t>(sum));
  }
}

// ---------------------------------------------------------------------------- launchers

template <typename acc_t>
LaunchStatus launch_merge_ranks(const RankMergeGeometry& geometry,
                                const MergeRanksParams<acc_t>& params, cudaStream_t stream) {
  return launch_kernel(merge_ranks_kernel<acc_t>, geometry.grid, dim3(kRankMergeThreads), 0, stream,
                       params);
}

template <typename acc_t>
LaunchStatus launch_sum_ranks(const RankMergeGeometry& geometry,
                              const SumRanksParams<acc_t>& params, cudaStream_t stream) {
  return launch_kernel(sum_ranks_kernel<acc_t>, geometry.grid, dim3(kRankMergeThreads), 0, stream,
                       params);
}

}  // namespace batchnorm_cuda
