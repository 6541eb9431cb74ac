#include "device_context.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "../device_query.h"
#include "../plan/known_devices.h"
#include "build_bindings.h"
#include "tensors.h"

namespace batchnorm_cuda {
namespace {

KnownDevices& known_devices() {
  static KnownDevices known;
  return known;
}

int index_of(c10::Device device) {
  return device.has_index() ? device.index() : c10::cuda::current_device();
}

}  // namespace

void bind_build(pybind11::module_&) {}

c10::DeviceType supported_device_type() { return c10::DeviceType::CUDA; }

const DeviceInfo& device_info(c10::Device device) {
  const int index = index_of(device);
  return known_devices().get(index, [&](DeviceInfo* info) {
    const LaunchStatus status = query_device(index, info);
    TORCH_CHECK(status == 0, "batch_norm: querying CUDA device ", std::to_string(index),
                " failed: ", describe_status(status));
  });
}

void refuse_scope(c10::Device device, Scope scope) {
  known_devices().refuse(index_of(device), scope);
}

cudaStream_t current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

at::Tensor sync_words(c10::Device device, int64_t words) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return allocate_zeros({words}, options);
  }
  static std::mutex mutex;
  // Never freed: at exit the CUDA context may be gone before static objects are.
  static auto& known = *new std::map<std::pair<int, cudaStream_t>, at::Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& tensor = known[{device.index(), current_stream(device)}];
  if (!tensor.defined() || tensor.numel() < words) tensor = allocate_zeros({words}, options);
  return tensor;
}

}  // namespace batchnorm_cuda
