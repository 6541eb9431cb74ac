// Merges the partial results of all splits, [rows, C], channel by channel in a fixed order, and
// forms what the channel needs from them: mean and invstd with the running-statistics update, the
// moments that a rank tells the others, the two sums of the backward pass with grad_weight and
// grad_bias, or the five of the double backward.
//
// threadIdx.x is the channel, threadIdx.y takes every threads_y-th row; column_reduce merges.
#pragma once

#include "../rank_params.h"
#include "formulas.cuh"
#include "launch.cuh"
#include "partials.cuh"
#include "statistics.cuh"

namespace batchnorm_cuda {

// Every row of the workspace begins with the channel of the row group's first lane.
template <typename acc_t>
__device__ __forceinline__ int64_t partial_column(const Partials<acc_t>& partials, int shift,
                                                  int64_t channel) {
  return (channel + shift) % partials.c;
}

template <typename acc_t>
__device__ __forceinline__ void finish(const MergeStatisticsParams<acc_t>& p, int64_t channel,
                                       const Welford<acc_t>& total) {
  const acc_t momentum = count_batch(p.statistics, 1, channel == 0);
  ChannelStatistics<acc_t>(p.statistics, total)
      .template save<ParamOf<acc_t>>(p.statistics, channel, momentum);
}

template <typename acc_t>
__device__ __forceinline__ void finish(const MergeMomentsParams<acc_t>& p, int64_t channel,
                                       const Welford<acc_t>& total) {
  if (channel == 0) store_global(p.moments.count(), p.count);
  store_global(p.moments.mean() + channel, total.shift + total.mean);
  store_global(p.moments.m2() + channel, total.m2);
}

template <typename acc_t>
__device__ __forceinline__ void finish(const MergeGradientsParams<acc_t>& p, int64_t channel,
                                       const GradSums<acc_t>& total) {
  if (p.sum_dy) store_global(p.sum_dy + channel, total.sum_dy);
  if (p.sum_dy_xhat) store_global(p.sum_dy_xhat + channel, total.sum_dy_xhat);
  if (p.grad_weight.data) store_param<ParamOf<acc_t>>(p.grad_weight, channel, total.sum_dy_xhat);
  if (p.grad_bias.data) store_param<ParamOf<acc_t>>(p.grad_bias, channel, total.sum_dy);
}

template <typename acc_t>
__device__ __forceinline__ void finish(const MergeDoubleGradientsParams<acc_t>& p, int64_t channel,
                                       DoubleGradSums<acc_t>& total) {
  if (p.sums.data) store_partial(p.sums, channel, total);
  if (!p.grad_weight.data) return;
  const acc_t count = static_cast<acc_t>(p.count);
  const acc_t product = p.training ? count * centred_product(total, count) : total.sum_ggx_dy;
  store_param<ParamOf<acc_t>>(p.grad_weight, channel, load_global(p.invstd + channel) * product);
}

// One block an SM is named because the compiler, left to itself, spills to make room for more.
template <typename Acc, typename Params>
__global__ void __launch_bounds__(kMergeThreads, 1) merge_kernel(const Params p) {
  using acc_t = std::remove_pointer_t<decltype(p.partials.data)>;
  acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared());
  const int64_t c = p.partials.c;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.x; first < c;
       first += int64_t{gridDim.x} * blockDim.x) {
    const int64_t channel = first + threadIdx.x;
    Acc acc[1];
    if (channel < c) {
      const int64_t column = partial_column(p.partials, p.shift, channel);
      // Four rows at a time keep four loads of every field in flight.
#pragma unroll 4
      for (int64_t row = threadIdx.y; row < p.partials.rows; row += blockDim.y) {
        acc[0].merge(load_partial<Acc>(p.partials, row * c + column));
      }
    }
    column_reduce<false>(acc, shared);
    if (threadIdx.y == 0 && channel < c) finish(p, channel, acc[0]);
  }
}

// ---------------------------------------------------------------------------- launcher

template <typename Acc, typename Params>
LaunchStatus launch_merge(const MergeGeometry& g, const Params& params, cudaStream_t stream) {
  return launch_kernel(merge_kernel<Acc, Params>, g.grid,
                       dim3(static_cast<unsigned>(g.threads_x), static_cast<unsigned>(g.threads_y)),
                       g.shared_bytes, stream, params);
}

}  // namespace batchnorm_cuda
