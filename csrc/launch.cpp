#include "launch.h"

#include <cuda_runtime.h>

namespace batchnorm_cuda {

LaunchStatus clear_mask(uint8_t* mask, int64_t bytes, cudaStream_t stream) {
  return static_cast<LaunchStatus>(cudaMemsetAsync(mask, 0, static_cast<size_t>(bytes), stream));
}

const char* describe_status(LaunchStatus status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

const char* name_of_status(LaunchStatus status) {
  return cudaGetErrorName(static_cast<cudaError_t>(status));
}

}  // namespace batchnorm_cuda
