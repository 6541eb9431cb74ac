// The reductions of the double backward over parts of channels, in one read of dy, ggx and x,
// where ggx is the gradient of grad_input: Σ dy, Σ dy·x̂, Σ ggx, Σ ggx·x̂ and Σ ggx·dy with
// x̂ = (x - mean) * invstd. One partial result per channel and part: [splits, C]. Products and sums
// are in acc_t, whatever the activation dtype. A tensor that takes no part is not read.
#pragma once

#include "accumulate.cuh"
#include "launch.cuh"
#include "partials.cuh"

namespace batchnorm_cuda {

template <typename Cursor>
__global__ void __launch_bounds__(kStageThreads, kStageBlocksPerSm)
    double_backward_reduce_kernel(const DoubleBackwardReduceParams<typename Cursor::scalar_t> p) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  constexpr int kChannels = Cursor::kChannels;
  // Along C, five sums for every lane leave registers for the three windows of one position.
  constexpr int kUnrollTriples = kChannels == 1 ? 2 : 1;
  acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared());
  const auto load = [&](auto lanes, const scalar_t* tensor,
                        const Window<typename Cursor::index_t>& window, bool aligned) {
    return load_window_or_zero<decltype(lanes)::value>(tensor, window, p.traversal.numel,
                                                       Cursor::kExact || aligned);
  };
  constexpr std::integral_constant<Lanes, Cursor::kLanes> whole;
  constexpr std::integral_constant<Lanes, Lanes::kMasked> masked;
  for (Stretch stretch(p.traversal, blockIdx.x); stretch.any();) {
    const Part part = stretch.take();
    Cursor cursor(p.traversal, part);
    DoubleGradSums<acc_t> sums[kChannels];
    acc_t mean[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      mean[c] = cursor.channel_valid(c) ? load_global(p.mean + cursor.channel(c)) : acc_t(0);
    }
    while (cursor.left > 0) {
      Vec<scalar_t> dy[kUnrollTriples], ggx[kUnrollTriples], x[kUnrollTriples];
#pragma unroll
      for (int u = 0; u < kUnrollTriples; ++u) {
        Window<typename Cursor::index_t> window = {0, 0, 0};
        if (cursor.left > 0) window = cursor.take();
        x[u] = load(whole, p.input, window, true);
        dy[u] = load(whole, p.grad_output, window, p.grad_output_aligned);
        ggx[u] = load(whole, p.grad_grad_input, window, p.grad_grad_input_aligned);
      }
      add_double_gradients<Cursor>(sums, dy, ggx, x, mean);
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const Vec<scalar_t> x[1] = {load(masked, p.input, edge, true)};
      const Vec<scalar_t> dy[1] = {load(masked, p.grad_output, edge, p.grad_output_aligned)};
      const Vec<scalar_t> ggx[1] = {
          load(masked, p.grad_grad_input, edge, p.grad_grad_input_aligned)};
      add_double_gradients<Cursor>(sums, dy, ggx, x, mean);
    });
    reduce_members<Cursor>(sums, shared);
    if (Cursor::member() == 0 && cursor.channel_valid(0)) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const acc_t invstd = load_global(p.invstd + cursor.channel(c));
        sums[c].sum_dy_xhat *= invstd;
        sums[c].sum_ggx_xhat *= invstd;
      }
    }
    store_partials(p.partials, p.traversal, part, cursor, sums, shared);
  }
}

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_double_backward_reduce(Pattern pattern,
                                           const DoubleBackwardReduceParams<scalar_t>& params,
                                           cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(double_backward_reduce_kernel<Cursor>, t.grid, block_of(t), t.shared_bytes,
                         stream, params);
  });
}

}  // namespace batchnorm_cuda
