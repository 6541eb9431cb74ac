// The one place that launches kernels, and the choice of a cursor type from the plan.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "launch.h"
#include "traversal.cuh"

namespace batchnorm_cuda {

inline dim3 block_of(const Traversal& t) {
  return dim3(static_cast<unsigned>(t.threads_x), static_cast<unsigned>(t.threads_y));
}

template <typename... Args>
inline LaunchStatus launch_kernel(void (*kernel)(Args...), int64_t grid, dim3 block,
                                  int64_t shared_bytes, cudaStream_t stream,
                                  const std::remove_const_t<Args>&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return static_cast<LaunchStatus>(cudaLaunchKernelEx(&config, kernel, args...));
}

// Lets launches of the kernel on the current device take this much dynamic shared memory. The limit
// is only ever raised: another thread may be about to launch the same kernel with more of it.
inline cudaError_t allow_shared_bytes(const void* kernel, int shared_bytes) {
  static std::mutex mutex;
  static auto& allowed = *new std::map<std::pair<const void*, int>, int>();
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = allowed[{kernel, device}];
  if (shared_bytes <= limit) return cudaSuccess;
  const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (raised == cudaSuccess) limit = shared_bytes;
  return raised;
}

// Launches a team kernel. Dynamic shared memory beyond the default is opted into; a grid that must
// be co-resident is first held against the occupancy of this very kernel.
template <typename... Args>
inline LaunchStatus launch_team(void (*kernel)(Args...), const Team& team, cudaStream_t stream,
                                const Args&... args) {
  const dim3 block = block_of(team.traversal);
  const auto shared_bytes = static_cast<int>(team.shared_bytes);
  cudaError_t status = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (status != cudaSuccess) return static_cast<LaunchStatus>(status);
  if (team.scope == Scope::kGrid) {
    int blocks = 0;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, kernel, static_cast<int>(block.x * block.y), static_cast<size_t>(shared_bytes));
    if (status != cudaSuccess) return static_cast<LaunchStatus>(status);
    if (blocks < team.blocks_per_sm) return kNotResident;
  }
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(team.grid));
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  if (team.scope == Scope::kGrid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  } else if (team.scope == Scope::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(team.size), 1, 1};
    config.numAttrs = 1;
  }
  return static_cast<LaunchStatus>(cudaLaunchKernelEx(&config, kernel, args...));
}

template <typename Cursor>
struct CursorTag {
  using type = Cursor;
};

// Calls launch(CursorTag<Cursor>{}) with the cursor type that the plan chose.
template <typename scalar_t, typename Launch>
inline LaunchStatus with_cursor(Pattern pattern, const Traversal& t, Launch&& launch) {
  if (pattern == Pattern::kAlongS) {
    if (!t.exact) return launch(CursorTag<AlongRuns<scalar_t, int64_t, false>>{});
    if (t.index_bits == 64) return launch(CursorTag<AlongRuns<scalar_t, int64_t, true>>{});
    return launch(CursorTag<AlongS<scalar_t, int32_t>>{});
  }
  if (!t.exact) return launch(CursorTag<AlongC<scalar_t, int64_t, false>>{});
  if (t.index_bits == 64) return launch(CursorTag<AlongC<scalar_t, int64_t, true>>{});
  return launch(CursorTag<AlongC<scalar_t, int32_t, true>>{});
}

// The same for the elementwise kernels, which walk along rows as well.
template <typename scalar_t, typename Launch>
inline LaunchStatus with_elementwise_cursor(Pattern pattern, const Traversal& t, Launch&& launch) {
  if (pattern == Pattern::kAlongRow) {
    if (!t.exact) return launch(CursorTag<AlongRow<scalar_t, int64_t, false>>{});
    if (t.index_bits == 64) return launch(CursorTag<AlongRow<scalar_t, int64_t>>{});
    return launch(CursorTag<AlongRow<scalar_t, int32_t>>{});
  }
  return with_cursor<scalar_t>(pattern, t, launch);
}

// The same for the fused kernels, of which there are fewer: the plan gives tensors that need 64-bit
// indices to the masked ones.
template <typename scalar_t, typename Launch>
inline LaunchStatus with_fused_cursor(Pattern pattern, const Traversal& t, Launch&& launch) {
  if (pattern == Pattern::kAlongS) {
    if (!t.exact) return launch(CursorTag<AlongRuns<scalar_t, int64_t, false>>{});
    return launch(CursorTag<AlongS<scalar_t, int32_t>>{});
  }
  if (!t.exact) return launch(CursorTag<AlongC<scalar_t, int64_t, false>>{});
  return launch(CursorTag<AlongC<scalar_t, int32_t, true>>{});
}
template <typename scalar_t, typename Launch>
inline LaunchStatus with_fused_elementwise_cursor(Pattern pattern, const Traversal& t,
                                                  Launch&& launch) {
  if (pattern == Pattern::kAlongRow) {
    if (!t.exact) return launch(CursorTag<AlongRow<scalar_t, int64_t, false>>{});
    return launch(CursorTag<AlongRow<scalar_t, int32_t>>{});
  }
  return with_fused_cursor<scalar_t>(pattern, t, launch);
}

}  // namespace batchnorm_cuda
