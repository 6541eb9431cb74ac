// The elementwise half of the backward pass. Training:
//   grad_input = weight*invstd * (dy - sum_dy/count - x̂ * sum_dy_xhat/count);
// eval, where the statistics are constants and x is not read: grad_input = weight*invstd * dy.
// dy may be that of a fused ReLU, and is then the gradient of a residual as well (fused.cuh).
#pragma once

#include "formulas.cuh"
#include "fused.cuh"
#include "launch.cuh"

namespace batchnorm_cuda {

template <typename Cursor, typename Params>
__device__ __forceinline__ auto load_gradient(const Params& p, const Cursor& cursor, int lane,
                                              typename Params::acc_t count) {
  using acc_t = typename Params::acc_t;
  if (!cursor.channel_valid(lane)) return GradInput<acc_t>{0};
  const int64_t c = cursor.channel(lane);
  const acc_t weight = load_param_or<typename Cursor::scalar_t>(p.weight, c, acc_t(1));
  const acc_t invstd = load_global(p.invstd + c);
  if (!p.input) return GradInput<acc_t>{weight * invstd};
  return make_grad_input<acc_t>(weight, load_global(p.mean + c), invstd, load_global(p.sum_dy + c),
                                load_global(p.sum_dy_xhat + c), count);
}

template <typename Cursor, Lanes kLanes, typename Params, typename Epilogue>
__device__ __forceinline__ void store_gradients(
    const Params& p, const Epilogue& epilogue, const Window<typename Cursor::index_t>& window,
    const Vec<typename Cursor::scalar_t>& dy, const Vec<typename Cursor::scalar_t>& x,
    const GradInput<typename Params::acc_t> (&channel)[Cursor::kChannels]) {
  store_output<Cursor::kExact, kLanes>(epilogue, dy, p.grad_input, window, [&](int l) {
    const auto &a = channel[Cursor::channel_of(l)], &b = channel[Cursor::channel_of(l + 1)];
    return grad_input(a, b, dy, x, l);
  });
}

template <typename Cursor, typename Epilogue>
__global__ void __launch_bounds__(kStageThreads, elementwise_blocks_per_sm(Cursor::kExact))
    backward_elementwise_kernel(const BackwardElementwiseParams<typename Cursor::scalar_t> p,
                                const Epilogue epilogue) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  constexpr int kUnrollPairs = kUnroll / 2;
  const int64_t numel = p.traversal.numel;
  constexpr bool kAligned = Cursor::kExact || kOnBoundaries<Epilogue>;
  const bool dy_aligned = kAligned || p.grad_output_aligned;
  const bool x_aligned = kAligned || p.input_aligned;
  const acc_t total = static_cast<acc_t>(p.total_count ? load_global(p.total_count) : p.count);
  // Backwards: what the reduce kernel read last may still be in the L2 cache.
  for (Stretch stretch(p.traversal, gridDim.x - 1 - blockIdx.x); stretch.any();) {
    const Part part = stretch.take_back();
    Cursor cursor(p.traversal, part);
    GradInput<acc_t> channel[Cursor::kChannels];
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) channel[c] = load_gradient(p, cursor, c, total);
    const auto count = cursor.seek_end(part);
    for (auto i = count; i > 0; i -= kUnrollPairs) {
      Window<typename Cursor::index_t> windows[kUnrollPairs];
      Vec<scalar_t> dy[kUnrollPairs], x[kUnrollPairs];
#pragma unroll
      for (int u = 0; u < kUnrollPairs; ++u) {
        windows[u] = {0, 0, 0};
        if (u < i) windows[u] = cursor.take_back();
        dy[u] = load_window<Cursor::kLanes>(p.grad_output, windows[u], numel, dy_aligned);
        x[u] = load_window_or_zero<Cursor::kLanes>(p.input, windows[u], numel, x_aligned);
      }
      filter(epilogue, dy, windows);
#pragma unroll
      for (int u = 0; u < kUnrollPairs; ++u) {
        store_gradients<Cursor, Cursor::kLanes>(p, epilogue, windows[u], dy[u], x[u], channel);
      }
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const Window<typename Cursor::index_t> windows[1] = {edge};
      Vec<scalar_t> dy[1] = {load_window<Lanes::kMasked>(p.grad_output, edge, numel, dy_aligned)};
      const auto x = load_window_or_zero<Lanes::kMasked>(p.input, edge, numel, x_aligned);
      filter(epilogue, dy, windows);
      store_gradients<Cursor, Lanes::kMasked>(p, epilogue, edge, dy[0], x, channel);
    });
  }
}

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_backward_elementwise(Pattern pattern,
                                         const BackwardElementwiseParams<scalar_t>& params,
                                         cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_elementwise_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Epilogue = Identity<acc_type<scalar_t>>;
    return launch_kernel(backward_elementwise_kernel<typename decltype(tag)::type, Epilogue>,
                         t.grid, block_of(t), 0, stream, params, Epilogue{});
  });
}

template <typename scalar_t>
LaunchStatus launch_backward_elementwise(Pattern pattern,
                                         const BackwardElementwiseParams<scalar_t>& params,
                                         const FusedBackward<scalar_t>& fused,
                                         cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_elementwise_cursor<scalar_t, true>(pattern, t, [&](auto tag) {
    using Epilogue = FusedBackward<scalar_t>;
    return launch_kernel(backward_elementwise_kernel<typename decltype(tag)::type, Epilogue>,
                         t.grid, block_of(t), 0, stream, params, fused);
  });
}

}  // namespace batchnorm_cuda
