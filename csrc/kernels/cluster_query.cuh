// How many clusters the current device holds at once: CUDA answers that for a kernel only, so here
// is one.
#pragma once

#include "../launch.h"
#include "platform.cuh"

namespace batchnorm_cuda {

constexpr int kFirstWithClusters = 90;  // compute capability 9.0

// Needs nothing but what its launch asks for.
__global__ void __launch_bounds__(kTeamThreads) probe_kernel() {}

// Of `size` blocks of shared_bytes each.
inline LaunchStatus count_clusters(int size, int shared_bytes, int* clusters) {
  cudaFuncAttributes attributes = {};
  cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status != cudaSuccess) return status;
  // Code for an older capability, which the driver compiles anew for this one, holds no clusters.
  if (attributes.ptxVersion < kFirstWithClusters) return cudaErrorNotSupported;
  status =
      cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(kTeamThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, probe_kernel, &config);
}

}  // namespace batchnorm_cuda
