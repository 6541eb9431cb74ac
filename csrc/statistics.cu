// Per-channel statistics of one split of a channel: the first stage of the training forward pass.
//
// A thread loads kUnroll windows, takes the mean and M2 of each of its channels over them by the
// corrected two-pass algorithm in registers, and merges that batch into its running statistics
// (reduce.cuh); one division serves a batch. Threads merge by group_reduce (along S) or
// column_reduce (along C); the block writes one partial result per channel: [splits, C].
#include "launch.cuh"
#include "partials.cuh"

namespace batchnorm_cuda {
namespace {

// Welford statistics of kChannels channels, fed with batches of kUnroll windows.
template <typename Cursor>
struct LaneStatistics {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  static constexpr int kChannels = Cursor::kChannels;
  static constexpr int kLanes = Cursor::kVecSize / kChannels;  // lanes per channel

  Welford<acc_t> channel[kChannels];

  // kFull: all windows are whole, and the number of values is a constant.
  template <bool kFull, typename Windows>
  __device__ __forceinline__ void add(const Vec<scalar_t> (&vec)[kUnroll], const Windows& windows) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      Welford<acc_t> batch;
      acc_t sum = 0;
      for_each_value<kFull>(vec, windows, c, [&](acc_t x) {
        sum += x;
        if (!kFull) batch.count += 1;
      });
      if (kFull) batch.count = kUnroll * kLanes;
      batch.shift = kFull ? sum * (acc_t(1) / (kUnroll * kLanes))
                          : sum / (batch.count > 0 ? batch.count : acc_t(1));
      acc_t residual = 0;
      for_each_value<kFull>(vec, windows, c, [&](acc_t x) {
        const acc_t deviation = x - batch.shift;
        residual += deviation;
        batch.m2 += deviation * deviation;
      });
      // The rounded mean leaves a residual: it corrects the mean and, in second order, M2.
      batch.mean = kFull ? residual * (acc_t(1) / (kUnroll * kLanes))
                         : residual / (batch.count > 0 ? batch.count : acc_t(1));
      batch.m2 -= residual * batch.mean;
      channel[c].merge(batch);
    }
  }

 private:
  template <bool kFull, typename Windows, typename F>
  __device__ __forceinline__ static void for_each_value(const Vec<scalar_t> (&vec)[kUnroll],
                                                        const Windows& windows, int c, F&& f) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int l = 0; l < kLanes; ++l) {
        const int lane = c * kLanes + l;
        if (kFull || windows[u].valid(lane)) f(to_acc(vec[u].lane[lane]));
      }
    }
  }
};

template <typename Cursor>
__global__ void __launch_bounds__(kStageThreads, kStageBlocksPerSm)
    collect_statistics_kernel(const StatisticsParams<typename Cursor::scalar_t> p) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared());
  for (int64_t task = blockIdx.x; task < p.traversal.tasks; task += gridDim.x) {
    Cursor cursor(p.traversal, task);
    LaneStatistics<Cursor> stats;
    Window<typename Cursor::index_t> windows[kUnroll];
    Vec<scalar_t> vec[kUnroll];
    while (Cursor::kExact && cursor.left >= kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        vec[u] = load_window<Cursor::kExact>(p.input, cursor.take(), p.traversal.numel, true);
      }
      stats.template add<true>(vec, windows);
    }
    while (cursor.left > 0) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        windows[u] = {0, 0, 0};
        if (cursor.left > 0) windows[u] = cursor.take();
        vec[u] = load_window<Cursor::kExact>(p.input, windows[u], p.traversal.numel, true);
      }
      stats.template add<false>(vec, windows);
    }
    bool writes;
    if constexpr (Cursor::kChannels == 1) {
      stats.channel[0] = group_reduce(stats.channel[0], blockDim.x, shared);
      writes = threadIdx.x == 0;
    } else {
      column_reduce(stats.channel, shared);
      writes = threadIdx.y == 0;
    }
    if (writes && cursor.channel_valid(0)) store_partials(p.partials, cursor, stats.channel);
  }
}

}  // namespace

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_statistics(Pattern pattern, const StatisticsParams<scalar_t>& params,
                               cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(collect_statistics_kernel<Cursor>, t.grid, block_of(t), t.shared_bytes,
                         stream, params);
  });
}

template LaunchStatus launch_statistics(Pattern, const StatisticsParams<__half>&, cudaStream_t);
template LaunchStatus launch_statistics(Pattern, const StatisticsParams<__nv_bfloat16>&,
                                        cudaStream_t);
template LaunchStatus launch_statistics(Pattern, const StatisticsParams<float>&, cudaStream_t);
template LaunchStatus launch_statistics(Pattern, const StatisticsParams<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
