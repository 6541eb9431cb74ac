#include "device_query.h"

#include <cuda_runtime.h>

namespace batchnorm_cuda {

// Blocks that a cluster may have on every device that has clusters.
constexpr int kPortableCluster = 8;

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
  info->max_cluster = properties.major >= 9 ? kPortableCluster : 0;
  return static_cast<LaunchStatus>(cudaSuccess);
}

}  // namespace batchnorm_cuda
