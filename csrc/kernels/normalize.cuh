// The elementwise half of the forward pass, y = (x - mean) * invstd * weight + bias, from saved
// batch statistics (training) or from the running ones (eval), and what is fused to it (fused.cuh).
// In eval the thread that owns a channel also leaves mean and invstd for the backward pass.
#pragma once

#include "formulas.cuh"
#include "fused.cuh"
#include "launch.cuh"

namespace batchnorm_cuda {

// What this thread's channels need; invalid channels (past C) get neutral values.
template <typename Cursor, typename Params>
__device__ __forceinline__ auto load_normalize(const Params& p, const Cursor& cursor, int lane) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = typename Params::acc_t;
  Normalize<acc_t> channel{0, 1, 0};
  if (!cursor.channel_valid(lane)) return channel;
  const int64_t c = cursor.channel(lane);
  acc_t invstd;
  if (p.use_running) {
    channel.mean = load_param<scalar_t, acc_t>(p.running_mean, c);
    invstd =
        inverse_sqrt(load_param<scalar_t, acc_t>(p.running_var, c) + static_cast<acc_t>(p.eps));
    if (p.mean && cursor.owns_channel(lane)) {
      store_global(p.mean + c, channel.mean);
      store_global(p.invstd + c, invstd);
    }
  } else {
    channel.mean = load_global(p.mean + c);
    invstd = load_global(p.invstd + c);
  }
  channel.scale = load_param_or<scalar_t>(p.weight, c, acc_t(1)) * invstd;
  channel.bias = load_param_or<scalar_t>(p.bias, c, acc_t(0));
  return channel;
}

template <typename Cursor, Lanes kLanes, typename Params, typename Epilogue>
__device__ __forceinline__ void store_normalized(
    const Params& p, const Epilogue& epilogue, const Window<typename Cursor::index_t>& window,
    const Vec<typename Cursor::scalar_t>& x, const OperandOf<Epilogue>& operand,
    const Normalize<typename Params::acc_t> (&channel)[Cursor::kChannels]) {
  store_output<Cursor::kExact, kLanes>(epilogue, operand, p.output, window, [&](int l) {
    return normalize(channel[Cursor::channel_of(l)], channel[Cursor::channel_of(l + 1)], x, l);
  });
}

template <typename Cursor, typename Epilogue>
__global__ void __launch_bounds__(kStageThreads, elementwise_blocks_per_sm(Cursor::kExact))
    transform_input_kernel(const NormalizeParams<typename Cursor::scalar_t> p,
                           const Epilogue epilogue) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  // With a residual as many loads in flight as without, and as many registers.
  constexpr int kWindows = std::is_same_v<Epilogue, Identity<acc_t>> ? kUnroll : kUnroll / 2;
  const int64_t numel = p.traversal.numel;
  const bool aligned = Cursor::kExact || p.input_aligned;
  // Backwards: what the reduce kernel read last may still be in the L2 cache.
  for (Stretch stretch(p.traversal, gridDim.x - 1 - blockIdx.x); stretch.any();) {
    const Part part = stretch.take_back();
    Cursor cursor(p.traversal, part);
    Normalize<acc_t> channel[Cursor::kChannels];
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) channel[c] = load_normalize(p, cursor, c);
    const auto count = cursor.seek_end(part);
    for (auto i = count; i > 0; i -= kWindows) {
      Window<typename Cursor::index_t> windows[kWindows];
      Vec<scalar_t> x[kWindows];
      OperandOf<Epilogue> operand[kWindows];
#pragma unroll
      for (int u = 0; u < kWindows; ++u) {
        windows[u] = {0, 0, 0};
        if (u < i) windows[u] = cursor.take_back();
        x[u] = load_window<Cursor::kLanes>(p.input, windows[u], numel, aligned);
        operand[u] = load_operand<Cursor::kExact, Cursor::kLanes>(epilogue, windows[u], numel);
      }
#pragma unroll
      for (int u = 0; u < kWindows; ++u) {
        store_normalized<Cursor, Cursor::kLanes>(p, epilogue, windows[u], x[u], operand[u],
                                                 channel);
      }
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const auto x = load_window<Lanes::kMasked>(p.input, edge, numel, aligned);
      const auto operand = load_operand<Cursor::kExact, Lanes::kMasked>(epilogue, edge, numel);
      store_normalized<Cursor, Lanes::kMasked>(p, epilogue, edge, x, operand, channel);
    });
  }
}

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_normalize(Pattern pattern, const NormalizeParams<scalar_t>& params,
                              cudaStream_t stream) {
  using Epilogue = Identity<acc_type<scalar_t>>;
  const Traversal& t = params.traversal;
  return with_elementwise_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(transform_input_kernel<Cursor, Epilogue>, t.grid, block_of(t), 0, stream,
                         params, Epilogue{});
  });
}

template <typename scalar_t>
LaunchStatus launch_normalize(Pattern pattern, const NormalizeParams<scalar_t>& params,
                              const FusedForward<scalar_t>& fused, cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_elementwise_cursor<scalar_t, true>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(transform_input_kernel<Cursor, FusedForward<scalar_t>>, t.grid,
                         block_of(t), 0, stream, params, fused);
  });
}

}  // namespace batchnorm_cuda
