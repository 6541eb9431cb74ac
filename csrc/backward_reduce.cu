// The two reductions of the backward pass over one split of a channel, in one read of dy and x:
// sum_dy = Σ dy and sum_dy_xhat = Σ dy·x̂ with x̂ = (x - mean) * invstd. One partial result per
// channel and split: [splits, C]. Products and sums are in acc_t, whatever the activation dtype.
#include "accumulate.cuh"
#include "launch.cuh"
#include "partials.cuh"

namespace batchnorm_cuda {
namespace {

template <typename Cursor>
__global__ void __launch_bounds__(kStageThreads, kStageBlocksPerSm)
    backward_reduce_kernel(const BackwardReduceParams<typename Cursor::scalar_t> p) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  constexpr int kChannels = Cursor::kChannels;
  constexpr int kUnrollPairs = kUnroll / 2;  // dy and x: as many loads in flight as the forward
  acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared());
  const int64_t numel = p.traversal.numel;
  const bool dy_aligned = Cursor::kExact || p.grad_output_aligned;
  for (int64_t task = blockIdx.x; task < p.traversal.tasks; task += gridDim.x) {
    Cursor cursor(p.traversal, task);
    GradSums<acc_t> sums[kChannels];
    acc_t mean[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      mean[c] = cursor.channel_valid(c) ? load_global(p.mean + cursor.channel(c)) : acc_t(0);
    }
    while (cursor.left > 0) {
      Vec<scalar_t> dy[kUnrollPairs], x[kUnrollPairs];
#pragma unroll
      for (int u = 0; u < kUnrollPairs; ++u) {
        Window<typename Cursor::index_t> window = {0, 0, 0};
        if (cursor.left > 0) window = cursor.take();
        x[u] = load_window<Cursor::kLanes>(p.input, window, numel, true);
        dy[u] = load_window<Cursor::kLanes>(p.grad_output, window, numel, dy_aligned);
      }
      add_gradients<Cursor>(sums, dy, x, mean);
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const Vec<scalar_t> dy[1] = {
          load_window<Lanes::kMasked>(p.grad_output, edge, numel, dy_aligned)};
      const Vec<scalar_t> x[1] = {load_window<Lanes::kMasked>(p.input, edge, numel, true)};
      add_gradients<Cursor>(sums, dy, x, mean);
    });
    reduce_members<Cursor>(sums, shared);
    if (Cursor::member() == 0 && cursor.channel_valid(0)) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        sums[c].sum_dy_xhat *= load_global(p.invstd + cursor.channel(c));
      }
      store_partials(p.partials, cursor, sums);
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_backward_reduce(Pattern pattern, const BackwardReduceParams<scalar_t>& params,
                                    cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(backward_reduce_kernel<Cursor>, t.grid, block_of(t), t.shared_bytes,
                         stream, params);
  });
}

template LaunchStatus launch_backward_reduce(Pattern, const BackwardReduceParams<__half>&,
                                             cudaStream_t);
template LaunchStatus launch_backward_reduce(Pattern, const BackwardReduceParams<__nv_bfloat16>&,
                                             cudaStream_t);
template LaunchStatus launch_backward_reduce(Pattern, const BackwardReduceParams<float>&,
                                             cudaStream_t);
template LaunchStatus launch_backward_reduce(Pattern, const BackwardReduceParams<double>&,
                                             cudaStream_t);

}  // namespace batchnorm_cuda
