// The one place that launches kernels, and the choice of a cursor type from the plan.
#pragma once

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "../launch.h"
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

// Grid and block of a team kernel. `attribute` must live as long as what is returned.
inline cudaLaunchConfig_t team_config(const Team& team, cudaStream_t stream,
                                      cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(team.grid));
  config.blockDim = block_of(team.traversal);
  config.dynamicSmemBytes = static_cast<size_t>(team.shared_bytes);
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
  return config;
}

// Clusters of this kernel that the current device can hold. Asked once: it is on the path of every
// launch, and the answer is the kernel's, the device's and the context's.
inline cudaError_t active_clusters(const void* kernel, const cudaLaunchConfig_t& config, int size,
                                   int* clusters) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::tuple<const void*, int, int, size_t>, int>();
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, size, config.dynamicSmemBytes);
  const auto found = known.find(key);
  if (found == known.end()) {
    status = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
    if (status == cudaSuccess) known.emplace(key, *clusters);
    return status;
  }
  *clusters = found->second;
  return cudaSuccess;
}

// Holds a team against the occupancy of this very kernel, before the launch: one that fails while a
// graph is captured may cost the capture. The blocks of a cooperative grid must all be resident,
// those of one cluster.
inline cudaError_t check_resident(const void* kernel, const Team& team,
                                  const cudaLaunchConfig_t& config, bool* resident) {
  int found = 1, needed = 1;
  cudaError_t status = cudaSuccess;
  if (team.scope == Scope::kGrid) {
    needed = team.blocks_per_sm;
    const auto threads = static_cast<int>(config.blockDim.x * config.blockDim.y);
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, threads,
                                                           config.dynamicSmemBytes);
  } else if (team.scope == Scope::kCluster) {
    status = active_clusters(kernel, config, team.size, &found);
  }
  *resident = status != cudaSuccess || found >= needed;
  return status;
}

// Errors by which a device refuses a cooperative grid or a cluster, where it is shared by MPS, MIG
// or green contexts for example. Nothing was launched, and other launches work.
inline bool is_refusal(cudaError_t error) {
  constexpr int kInvalidResourceConfiguration = 915;  // green contexts; no name before CUDA 12.4
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorLaunchOutOfResources ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorNotSupported || error == cudaErrorNotPermitted ||
         static_cast<int>(error) == kInvalidResourceConfiguration;
}

// Launches a team kernel. Dynamic shared memory beyond the default is opted into.
template <typename... Args>
inline LaunchStatus launch_team(void (*kernel)(Args...), const Team& team, cudaStream_t stream,
                                const Args&... args) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = team_config(team, stream, attribute);
  bool resident = true;
  cudaError_t status = allow_shared_bytes(function, static_cast<int>(team.shared_bytes));
  if (status == cudaSuccess) status = check_resident(function, team, config, &resident);
  if (!resident) return kNotResident;
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, kernel, args...);
  if (team.scope == Scope::kBlock || !is_refusal(status)) return static_cast<LaunchStatus>(status);
  static_cast<void>(cudaGetLastError());  // else whoever checks next would take it for their own
  return refused_by(static_cast<int>(status));
}

template <typename Cursor>
struct CursorTag {
  using type = Cursor;
};

// Calls launch(CursorTag<Cursor>{}) with the cursor type that the plan chose. Where indices need 64
// bits that is a masked one, which moves whole windows alike; of runs it would take the first
// window for an edge, so that those have a type of their own, in kernels that fuse nothing.
template <typename scalar_t, bool kFused = false, typename Launch>
inline LaunchStatus with_cursor(Pattern pattern, const Traversal& t, Launch&& launch) {
  if (pattern == Pattern::kAlongS) {
    if (!t.exact) return launch(CursorTag<AlongRuns<scalar_t, int64_t, false>>{});
    if constexpr (!kFused) {
      if (t.index_bits == 64) return launch(CursorTag<AlongRuns<scalar_t, int64_t, true>>{});
    }
    return launch(CursorTag<AlongS<scalar_t, int32_t>>{});
  }
  if (!t.exact) return launch(CursorTag<AlongC<scalar_t, int64_t, false>>{});
  return launch(CursorTag<AlongC<scalar_t, int32_t, true>>{});
}

// The same for the elementwise kernels, which walk along rows as well.
template <typename scalar_t, bool kFused = false, typename Launch>
inline LaunchStatus with_elementwise_cursor(Pattern pattern, const Traversal& t, Launch&& launch) {
  if (pattern == Pattern::kAlongRow) {
    if (!t.exact) return launch(CursorTag<AlongRow<scalar_t, int64_t, false>>{});
    return launch(CursorTag<AlongRow<scalar_t, int32_t>>{});
  }
  return with_cursor<scalar_t, kFused>(pattern, t, launch);
}

}  // namespace batchnorm_cuda
