// The elementwise half of the forward pass, y = (x - mean) * invstd * weight + bias, from saved
// batch statistics (training) or from the running ones (eval). In eval the thread that owns a
// channel also leaves mean and invstd for the backward pass.
#include "formulas.cuh"
#include "launch.cuh"

namespace batchnorm_cuda {
namespace {

// What this thread's channels need; invalid channels (past C) get neutral values.
template <typename Cursor, typename Params>
__device__ __forceinline__ auto load_channel(const Params& p, const Cursor& cursor, int lane) {
  using acc_t = typename Params::acc_t;
  Normalize<acc_t> channel{0, 1, 0};
  if (!cursor.channel_valid(lane)) return channel;
  const int64_t c = cursor.channel(lane);
  acc_t invstd;
  if (p.use_running) {
    channel.mean = load_param<acc_t>(p.running_mean, c);
    invstd = inverse_sqrt(load_param<acc_t>(p.running_var, c) + static_cast<acc_t>(p.eps));
    if (p.mean && cursor.owns_channel(lane)) {
      store_global(p.mean + c, channel.mean);
      store_global(p.invstd + c, invstd);
    }
  } else {
    channel.mean = load_global(p.mean + c);
    invstd = load_global(p.invstd + c);
  }
  channel.scale = load_param_or<acc_t>(p.weight, c, 1) * invstd;
  channel.bias = load_param_or<acc_t>(p.bias, c, 0);
  return channel;
}

template <typename Cursor, Lanes kLanes, typename Params>
__device__ __forceinline__ void store_normalized(
    const Params& p, const Window<typename Cursor::index_t>& window,
    const Vec<typename Cursor::scalar_t>& x,
    const Normalize<typename Params::acc_t> (&channel)[Cursor::kChannels]) {
  Vec<typename Cursor::scalar_t> y;
#pragma unroll
  for (int l = 0; l < Cursor::kVecSize; l += 2) {
    round_into(y, l,
               normalize(channel[Cursor::channel_of(l)], channel[Cursor::channel_of(l + 1)], x, l));
  }
  store_window<kLanes>(p.output, window, y);
}

template <typename Cursor>
__global__ void __launch_bounds__(kStageThreads, kElementwiseBlocksPerSm)
    transform_input_kernel(const NormalizeParams<typename Cursor::scalar_t> p) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  const int64_t numel = p.traversal.numel;
  const bool aligned = Cursor::kExact || p.input_aligned;
  // Backwards: what the reduce kernel read last may still be in the L2 cache.
  for (int64_t task = p.traversal.tasks - 1 - blockIdx.x; task >= 0; task -= gridDim.x) {
    Cursor cursor(p.traversal, task);
    Normalize<acc_t> channel[Cursor::kChannels];
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) channel[c] = load_channel(p, cursor, c);
    const auto count = cursor.seek_end();
    for (auto i = count; i > 0; i -= kUnroll) {
      Window<typename Cursor::index_t> windows[kUnroll];
      Vec<scalar_t> x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        windows[u] = {0, 0, 0};
        if (u < i) windows[u] = cursor.take_back();
        x[u] = load_window<Cursor::kLanes>(p.input, windows[u], numel, aligned);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        store_normalized<Cursor, Cursor::kLanes>(p, windows[u], x[u], channel);
      }
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const auto x = load_window<Lanes::kMasked>(p.input, edge, numel, aligned);
      store_normalized<Cursor, Lanes::kMasked>(p, edge, x, channel);
    });
  }
}

}  // namespace

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_normalize(Pattern pattern, const NormalizeParams<scalar_t>& params,
                              cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_elementwise_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(transform_input_kernel<Cursor>, t.grid, block_of(t), 0, stream, params);
  });
}

template LaunchStatus launch_normalize(Pattern, const NormalizeParams<__half>&, cudaStream_t);
template LaunchStatus launch_normalize(Pattern, const NormalizeParams<__nv_bfloat16>&,
                                       cudaStream_t);
template LaunchStatus launch_normalize(Pattern, const NormalizeParams<float>&, cudaStream_t);
template LaunchStatus launch_normalize(Pattern, const NormalizeParams<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
