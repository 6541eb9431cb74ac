// How many clusters a device holds at once: CUDA answers that for a kernel only, so here is one.
#include "device_query.h"
#include "platform.cuh"

namespace batchnorm_cuda {
namespace {

constexpr int kFirstWithClusters = 90;      // compute capability 9.0
constexpr int kCapturesDependents = 12030;  // CUDA 12.3: graphs take dependent launches

// Needs nothing but what its launch asks for.
__global__ void __launch_bounds__(kTeamThreads) probe_kernel() {}

// Of `size` blocks, each with an SM of its own.
cudaError_t count_clusters(int size, int shared_bytes, int* clusters) {
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

}  // namespace

void query_clusters(DeviceInfo* info) {
  // All that a block may have is more than half of an SM's: no SM takes two of them.
  const auto shared_bytes = static_cast<int>(info->shared_bytes_per_block_optin);
  cudaFuncAttributes attributes = {};
  if (info->compute_major * 10 < kFirstWithClusters) return;
  cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  // Code for an older capability, which the driver compiles anew for this one, holds no clusters,
  // and no waits of dependent kernels.
  if (status == cudaSuccess && attributes.ptxVersion < kFirstWithClusters) return;
  int driver = 0;
  const bool known = status == cudaSuccess && cudaDriverGetVersion(&driver) == cudaSuccess;
  info->dependent_launch = known && driver >= kCapturesDependents;
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes);
  }
  int* const counts[] = {&info->clusters_of_2, &info->clusters_of_4, &info->clusters_of_8};
  for (int i = 0, size = 2; i < 3 && status == cudaSuccess; ++i, size *= 2) {
    status = count_clusters(size, shared_bytes, counts[i]);
    if (status == cudaSuccess) info->max_cluster = size;
  }
  static_cast<void>(cudaGetLastError());
}

}  // namespace batchnorm_cuda
