// The two reductions of the backward pass over parts of channels, in one read of dy and x:
// sum_dy = Σ dy and sum_dy_xhat = Σ dy·x̂ with x̂ = (x - mean) * invstd. One partial result per
// channel and part: [splits, C]. Products and sums are in acc_t, whatever the activation dtype.
// dy may be that of a fused ReLU (fused.cuh).
#pragma once

#include "accumulate.cuh"
#include "fused.cuh"
#include "launch.cuh"
#include "partials.cuh"

namespace batchnorm_cuda {

template <typename Cursor, typename Epilogue>
__global__ void __launch_bounds__(kStageThreads, kStageBlocksPerSm)
    backward_reduce_kernel(const BackwardReduceParams<typename Cursor::scalar_t> p,
                           const Epilogue epilogue) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  constexpr int kChannels = Cursor::kChannels;
  constexpr int kUnrollPairs = kUnroll / 2;  // dy and x: as many loads in flight as the forward
  acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared());
  const int64_t numel = p.traversal.numel;
  const bool dy_aligned = Cursor::kExact || kOnBoundaries<Epilogue> || p.grad_output_aligned;
  for (Stretch stretch(p.traversal, blockIdx.x); stretch.any();) {
    const Part part = stretch.take();
    Cursor cursor(p.traversal, part);
    GradSums<acc_t> sums[kChannels];
    acc_t mean[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      mean[c] = cursor.channel_valid(c) ? load_global(p.mean + cursor.channel(c)) : acc_t(0);
    }
    struct Batch {
      Vec<scalar_t> dy[kUnrollPairs], x[kUnrollPairs];
      Window<typename Cursor::index_t> windows[kUnrollPairs];
    };
    const auto load_batch = [&](Batch& batch) {
#pragma unroll
      for (int u = 0; u < kUnrollPairs; ++u) {
        batch.windows[u] = {0, 0, 0};
        if (cursor.left > 0) batch.windows[u] = cursor.take();
        batch.x[u] = load_window<Cursor::kLanes>(p.input, batch.windows[u], numel, true);
        batch.dy[u] =
            load_window<Cursor::kLanes>(p.grad_output, batch.windows[u], numel, dy_aligned);
      }
    };
    const auto add = [&](Batch& batch) {
      filter(epilogue, batch.dy, batch.windows);
      add_gradients<Cursor>(sums, batch.dy, batch.x, mean);
    };
    if constexpr (kLoadsAhead<Cursor> && std::is_same_v<Epilogue, Identity<acc_t>>) {
      Batch ahead;
      bool more = cursor.left > 0;
      if (more) load_batch(ahead);
      while (more) {
        Batch batch = ahead;
        more = cursor.left > 0;
        if (more) load_batch(ahead);
        add(batch);
      }
    } else {
      while (cursor.left > 0) {
        Batch batch;
        load_batch(batch);
        add(batch);
      }
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const Window<typename Cursor::index_t> windows[1] = {edge};
      Vec<scalar_t> dy[1] = {load_window<Lanes::kMasked>(p.grad_output, edge, numel, dy_aligned)};
      const Vec<scalar_t> x[1] = {load_window<Lanes::kMasked>(p.input, edge, numel, true)};
      filter(epilogue, dy, windows);
      add_gradients<Cursor>(sums, dy, x, mean);
    });
    reduce_members<Cursor>(sums, shared);
    if (Cursor::member() == 0 && cursor.channel_valid(0)) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        sums[c].sum_dy_xhat *= load_global(p.invstd + cursor.channel(c));
      }
    }
    store_partials(p.partials, p.traversal, part, cursor, sums, shared);
  }
}

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_backward_reduce(Pattern pattern, const BackwardReduceParams<scalar_t>& params,
                                    cudaStream_t stream) {
  using Epilogue = Identity<acc_type<scalar_t>>;
  const Traversal& t = params.traversal;
  return with_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(backward_reduce_kernel<Cursor, Epilogue>, t.grid, block_of(t),
                         t.shared_bytes, stream, params, Epilogue{});
  });
}

template <typename scalar_t>
LaunchStatus launch_backward_reduce(Pattern pattern, const BackwardReduceParams<scalar_t>& params,
                                    const FusedBackward<scalar_t>& fused, cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_cursor<scalar_t, true>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(backward_reduce_kernel<Cursor, FusedBackward<scalar_t>>, t.grid,
                         block_of(t), t.shared_bytes, stream, params, fused);
  });
}

}  // namespace batchnorm_cuda
