// Per-channel statistics of parts of channels: the first stage of the training forward pass.
//
// A thread loads kUnroll windows at a time and merges them, as one batch, into the statistics of
// its channels (accumulate.cuh); the block merges its threads (reduce.cuh) and writes one partial
// result per channel and part: [splits, C].
#pragma once

#include "accumulate.cuh"
#include "launch.cuh"
#include "partials.cuh"

namespace batchnorm_cuda {

template <typename Cursor>
__global__ void __launch_bounds__(kStageThreads, kStageBlocksPerSm)
    collect_statistics_kernel(const StatisticsParams<typename Cursor::scalar_t> p) {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared());
  for (Stretch stretch(p.traversal, blockIdx.x); stretch.any();) {
    const Part part = stretch.take();
    Cursor cursor(p.traversal, part);
    Welford<acc_t> stats[Cursor::kChannels];
    const Window<typename Cursor::index_t> whole[kUnroll] = {};  // whatever they say
    const auto load_batch = [&](Vec<scalar_t>(&vec)[kUnroll]) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        vec[u] = load_window<Cursor::kLanes>(p.input, cursor.take(), p.traversal.numel, true);
      }
    };
    if constexpr (kLoadsAhead<Cursor>) {
      Vec<scalar_t> ahead[kUnroll];
      bool more = cursor.left >= kUnroll;
      if (more) load_batch(ahead);
      while (more) {
        Vec<scalar_t> vec[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) vec[u] = ahead[u];
        more = cursor.left >= kUnroll;
        if (more) load_batch(ahead);
        add_statistics<Cursor, Batched::kFull>(stats, vec, whole);
      }
    } else {
      while (cursor.left >= kUnroll) {
        Vec<scalar_t> vec[kUnroll];
        load_batch(vec);
        add_statistics<Cursor, Batched::kFull>(stats, vec, whole);
      }
    }
    while (cursor.left > 0) {
      Vec<scalar_t> vec[kUnroll];
      Window<typename Cursor::index_t> windows[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        windows[u] = {0, 0, 0};
        if (cursor.left > 0) windows[u] = cursor.take();
        vec[u] = load_window<Cursor::kLanes>(p.input, windows[u], p.traversal.numel, true);
      }
      add_statistics<Cursor, Batched::kPresent>(stats, vec, windows);
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const Window<typename Cursor::index_t> windows[1] = {edge};
      const Vec<scalar_t> vec[1] = {
          load_window<Lanes::kMasked>(p.input, edge, p.traversal.numel, true)};
      add_statistics<Cursor, Batched::kMasked>(stats, vec, windows);
    });
    reduce_members<Cursor>(stats, shared);
    store_partials(p.partials, p.traversal, part, cursor, stats, shared);
  }
}

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

}  // namespace batchnorm_cuda
