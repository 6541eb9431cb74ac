// The host build's answers to csrc/device_context.h: kernels take CPU tensors, and there is one
// stream, on which every launch is complete when it returns.
#include "device_context.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "device_query.h"
#include "simt.h"

namespace batchnorm_cuda {

c10::DeviceType supported_device_type() { return c10::DeviceType::CPU; }

const DeviceInfo& device_info(c10::Device) {
  static thread_local DeviceInfo info;
  // The model's device may be described anew (host_bindings.cpp).
  static thread_local int64_t known = 0;
  const int64_t number = simt::description_number();
  if (number == known) return info;
  const LaunchStatus status = query_device(0, &info);
  TORCH_CHECK(status == 0,
              "batch_norm: querying the modelled device failed: ", describe_status(status));
  known = number;
  return info;
}

cudaStream_t current_stream(c10::Device) { return nullptr; }

at::Tensor sync_words(c10::Device, int64_t words) {
  // One set a thread stands for one a stream: launches of one thread follow one another.
  static thread_local at::Tensor tensor;
  if (!tensor.defined() || tensor.numel() < words) tensor = at::zeros({words}, at::kLong);
  return tensor;
}

}  // namespace batchnorm_cuda
