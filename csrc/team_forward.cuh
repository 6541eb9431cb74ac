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

  // scale holds the weight until the statistics are known.
  Normalize<acc_t> channel[kChannels];
  acc_t momentum;  // of the running statistics, in this round

  __device__ __forceinline__ static const scalar_t* tensor(const Params& p, int) { return p.input; }
  __device__ __forceinline__ static scalar_t* output(const Params& p) { return p.output; }

  __device__ __forceinline__ TeamForward(const Params&, const Cursor&) {}

  __device__ __forceinline__ void prefetch(const Params& p, const Cursor& cursor, int c) {
    channel[c] = {0, 1, 0};
    if (!cursor.channel_valid(c)) return;
    channel[c].scale = load_param_or<acc_t>(p.weight, cursor.channel(c), 1);
    channel[c].bias = load_param_or<acc_t>(p.bias, cursor.channel(c), 0);
  }

  template <Batched kBatched, int kBatch>
  __device__ __forceinline__ void accumulate(
      Acc (&acc)[kChannels], const Vec<scalar_t> (&vec)[kTensors][kBatch],
      const Window<typename Cursor::index_t> (&windows)[kBatch]) const {
    add_statistics<Cursor, kBatched>(acc, vec[0], windows);
  }

  // Once a thread and round, not once a channel: the channels of a thread have no registers left.
  __device__ __forceinline__ void begin_finish(const Params& p, const Cursor& cursor) {
    int channels = 0;
    bool first = false;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (!cursor.channel_valid(c) || !cursor.owns_channel(c)) continue;
      channels += 1;
      first |= cursor.channel(c) == 0;
    }
    momentum = channels > 0 ? count_batch(p.statistics, channels, first) : acc_t(0);
  }

  __device__ __forceinline__ void finish(const Params& p, const Cursor& cursor, const Acc& total,
                                         int c) {
    if (!cursor.channel_valid(c)) return;
    const ChannelStatistics<acc_t> statistics(p.statistics, total);
    channel[c].mean = statistics.mean;
    channel[c].scale *= statistics.invstd;
    if (cursor.owns_channel(c)) statistics.save(p.statistics, cursor.channel(c), momentum);
  }

  __device__ __forceinline__ Pair<acc_t> form(const Vec<scalar_t> (&vec)[kTensors], int l) const {
    return normalize(channel[Cursor::channel_of(l)], channel[Cursor::channel_of(l + 1)], vec[0], l);
  }
};

}  // namespace batchnorm_cuda
