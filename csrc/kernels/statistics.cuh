// From a channel's merged accumulator to what the channel needs: mean, invstd and the update of the
// running statistics, for the merge kernel and the team kernel alike.
#pragma once

#include "../params.h"
#include "formulas.cuh"
#include "reduce.cuh"
#include "vec_io.cuh"

namespace batchnorm_cuda {

// Counts the batch; returns the momentum of the running statistics. To be called once by each
// thread that saves channels, before it does, with their number; `first` where channel 0 is one of
// them.
//
// For the cumulative average every channel needs the count from before, one thread has to write the
// one after, and no barrier spans the blocks of them all. So a thread adds a unit for each of its
// channels, far above any count, which leaves the count below readable; the last one takes all
// units away and adds the batch.
template <typename acc_t>
__device__ __forceinline__ acc_t count_batch(const StatisticsOutput<acc_t>& p, int channels,
                                             bool first) {
  if (p.arrival_shift == 0) {
    if (first && p.num_batches_tracked) {
      store_global(p.num_batches_tracked, load_global(p.num_batches_tracked) + 1);
    }
    return static_cast<acc_t>(p.momentum);
  }
  const int64_t unit = int64_t{1} << p.arrival_shift;
  const int64_t found = fetch_add_relaxed(p.num_batches_tracked, channels * unit);
  const int64_t arrived = (found + unit / 2) >> p.arrival_shift;  // a count may be negative
  if (arrived == p.c - channels) fetch_add_relaxed(p.num_batches_tracked, 1 - p.c * unit);
  return acc_t(1) / static_cast<acc_t>(found - arrived * unit + 1);
}

template <typename acc_t>
struct ChannelStatistics {
  acc_t mean, invstd, unbiased_var;

  __device__ __forceinline__ ChannelStatistics(const StatisticsOutput<acc_t>& p,
                                               const Welford<acc_t>& total) {
    const acc_t count = static_cast<acc_t>(p.count);
    mean = total.shift + total.mean;
    invstd = inverse_sqrt(total.m2 / count + static_cast<acc_t>(p.eps));  // biased variance
    unbiased_var = total.m2 / (count > 1 ? count - 1 : acc_t(1));
  }

  // To be called by one thread per channel and launch. `scalar_t`: see with_param().
  template <typename scalar_t>
  __device__ __forceinline__ void save(const StatisticsOutput<acc_t>& p, int64_t channel,
                                       acc_t momentum) const {
    store_global(p.save_mean + channel, mean);
    store_global(p.save_invstd + channel, invstd);
    if (p.running_mean.data == nullptr) return;
    update<scalar_t>(p.running_mean, channel, mean, momentum);
    update<scalar_t>(p.running_var, channel, unbiased_var, momentum);
  }

 private:
  template <typename scalar_t>
  __device__ __forceinline__ static void update(const ParamPointer& running, int64_t channel,
                                                acc_t batch, acc_t momentum) {
    store_param<scalar_t>(
        running, channel,
        update_running(load_param<scalar_t, acc_t>(running, channel), batch, momentum));
  }
};

}  // namespace batchnorm_cuda
