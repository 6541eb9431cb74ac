// The one place that launches kernels, and the choice of a cursor type from the plan.
#pragma once

#include "launch.h"
#include "traversal.cuh"

namespace batchnorm_cuda {

template <typename Params>
inline LaunchStatus launch_kernel(void (*kernel)(Params), int64_t grid, dim3 block,
                                  int64_t shared_bytes, cudaStream_t stream, const Params& params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return static_cast<LaunchStatus>(cudaLaunchKernelEx(&config, kernel, params));
}

template <typename Cursor>
struct CursorTag {
  using type = Cursor;
};

// Calls launch(CursorTag<Cursor>{}) with the cursor type that the plan chose.
template <typename scalar_t, typename Launch>
inline LaunchStatus with_cursor(Pattern pattern, const Traversal& t, Launch&& launch) {
  if (pattern == Pattern::kAlongS) {
    if (!t.exact) return launch(CursorTag<AlongS<scalar_t, int64_t, false>>{});
    if (t.index_bits == 64) return launch(CursorTag<AlongS<scalar_t, int64_t, true>>{});
    return launch(CursorTag<AlongS<scalar_t, int32_t, true>>{});
  }
  if (!t.exact) return launch(CursorTag<AlongC<scalar_t, int64_t, false>>{});
  if (t.index_bits == 64) return launch(CursorTag<AlongC<scalar_t, int64_t, true>>{});
  return launch(CursorTag<AlongC<scalar_t, int32_t, true>>{});
}

inline dim3 block_of(const Traversal& t) {
  return dim3(static_cast<unsigned>(t.threads_x), static_cast<unsigned>(t.threads_y));
}

}  // namespace batchnorm_cuda
