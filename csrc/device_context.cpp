#include "device_context.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

namespace batchnorm_cuda {
namespace {

DeviceInfo query(int device) {
  cudaDeviceProp properties;
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  DeviceInfo info;
  info.name = properties.name;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  info.sm_count = properties.multiProcessorCount;
  info.max_threads_per_sm = properties.maxThreadsPerMultiProcessor;
  info.registers_per_sm = properties.regsPerMultiprocessor;
  info.shared_bytes_per_sm = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  info.shared_bytes_per_block = static_cast<int64_t>(properties.sharedMemPerBlock);
  info.shared_bytes_per_block_optin = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info.l2_bytes = properties.l2CacheSize;
  info.max_grid = properties.maxGridSize[0];
  info.cooperative = properties.cooperativeLaunch != 0;
  return info;
}

}  // namespace

c10::DeviceType supported_device_type() { return c10::DeviceType::CUDA; }

const DeviceInfo& device_info(c10::Device device) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;  // references into a map stay valid
  const int index = device.has_index() ? device.index() : c10::cuda::current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, query(index)).first->second;
}

cudaStream_t current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

}  // namespace batchnorm_cuda
