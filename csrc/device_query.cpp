#include "device_query.h"

#include <cuda_runtime.h>

#include "kernel_table.h"

namespace batchnorm_cuda {
namespace {

// What clusters the current device takes, and how many; none where that cannot be known.
void query_clusters(DeviceInfo* info) {
  if (info->compute_major < 9) return;
  // All that a block may have is more than half of an SM's: no SM takes two of them.
  const auto shared_bytes = static_cast<int>(info->shared_bytes_per_block_optin);
  int* const counts[] = {&info->clusters_of_2, &info->clusters_of_4, &info->clusters_of_8};
  for (int i = 0, size = 2; i < 3; ++i, size *= 2) {
    if (common_kernels().count_clusters(size, shared_bytes, counts[i]) != cudaSuccess) break;
    info->max_cluster = size;
  }
  static_cast<void>(cudaGetLastError());
}

}  // namespace

LaunchStatus query_device(int device, DeviceInfo* info) {
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess) return static_cast<LaunchStatus>(status);
  info->name = properties.name;
  info->compute_major = properties.major;
  info->compute_minor = properties.minor;
  info->sm_count = properties.multiProcessorCount;
  info->max_threads_per_sm = properties.maxThreadsPerMultiProcessor;
  info->registers_per_sm = properties.regsPerMultiprocessor;
  info->shared_bytes_per_sm = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  info->shared_bytes_per_block = static_cast<int64_t>(properties.sharedMemPerBlock);
  info->shared_bytes_per_block_optin = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info->l2_bytes = properties.l2CacheSize;
  info->max_grid = properties.maxGridSize[0];
  info->cooperative = properties.cooperativeLaunch != 0;
  int current = 0;
  cudaError_t chosen = cudaGetDevice(&current);
  if (chosen == cudaSuccess && current != device) chosen = cudaSetDevice(device);
  if (chosen == cudaSuccess) query_clusters(info);
  if (chosen == cudaSuccess && current != device) chosen = cudaSetDevice(current);
  return static_cast<LaunchStatus>(chosen);
}

}  // namespace batchnorm_cuda
