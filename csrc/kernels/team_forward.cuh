// Training forward in one read and one write of the activations: statistics and normalisation of a
// channel group by one team of blocks (team_kernel.cuh). y = (x - mean) * invstd * weight + bias.
#pragma once

#include "statistics.cuh"
#include "team_kernel.cuh"

namespace batchnorm_cuda {

template <typename Cursor>
struct TeamForward {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  using Params = TeamForwardParams<scalar_t>;
  using Acc = Welford<acc_t>;
  static constexpr int kTensors = 1;
  static constexpr int kChannels = Cursor::kChannels;

  using Formula = Normalize<acc_t>;

  Formula formula[kChannels];

  struct Parameters {
    acc_t weight, bias;
  };
  __device__ __forceinline__ static Parameters load_parameters(const Params& p, int64_t channel) {
    return {load_param_or<scalar_t>(p.weight, channel, acc_t(1)),
            load_param_or<scalar_t>(p.bias, channel, acc_t(0))};
  }

  __device__ __forceinline__ static const scalar_t* tensor(const Params& p, int) { return p.input; }
  __device__ __forceinline__ static scalar_t* output(const Params& p) { return p.output; }

  __device__ __forceinline__ TeamForward(const Params&, const Cursor&) {}

  template <Batched kBatched, int kBatch>
  __device__ __forceinline__ void accumulate(
      Acc (&acc)[kChannels], const Vec<scalar_t> (&vec)[kTensors][kBatch],
      const Window<typename Cursor::index_t> (&windows)[kBatch]) const {
    add_statistics<Cursor, kBatched>(acc, vec[0], windows);
  }

  __device__ __forceinline__ static Formula finish(const Params& p, const Parameters& parameters,
                                                   const Acc& total, int64_t channel, bool owner) {
    const ChannelStatistics<acc_t> statistics(p.statistics, total);
    if (owner) {
      const acc_t momentum = count_batch(p.statistics, 1, channel == 0);
      statistics.template save<scalar_t>(p.statistics, channel, momentum);
    }
    return {statistics.mean, parameters.weight * statistics.invstd, parameters.bias};
  }

  __device__ __forceinline__ Pair<acc_t> form(const Vec<scalar_t> (&vec)[kTensors], int l) const {
    return normalize(formula[Cursor::channel_of(l)], formula[Cursor::channel_of(l + 1)], vec[0], l);
  }
};

}  // namespace batchnorm_cuda
