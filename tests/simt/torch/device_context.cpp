// The host build's answers to csrc/torch/device_context.h: kernels take CPU tensors, and there is
// one stream, on which every launch is complete when it returns.
#include "torch/device_context.h"

#include <c10/util/Exception.h>

#include "device_query.h"
#include "plan/known_devices.h"
#include "simt.h"
#include "torch/tensors.h"

namespace batchnorm_cuda {
namespace {

KnownDevices& known_devices() {
  static KnownDevices known;
  return known;
}

}  // namespace

c10::DeviceType supported_device_type() { return c10::DeviceType::CPU; }

// The model's device may be described anew (host_bindings.cpp), and is another one then.
const DeviceInfo& device_info(c10::Device) {
  return known_devices().get(simt::description_number(), [](DeviceInfo* info) {
    const LaunchStatus status = query_device(0, info);
    TORCH_CHECK(status == 0,
                "batch_norm: querying the modelled device failed: ", describe_status(status));
  });
}

void refuse_scope(c10::Device, Scope scope) {
  known_devices().refuse(simt::description_number(), scope);
}

cudaStream_t current_stream(c10::Device) { return nullptr; }

at::Tensor sync_words(c10::Device, int64_t words) {
  // One set a thread stands for one a stream: launches of one thread follow one another.
  static thread_local at::Tensor tensor;
  if (!tensor.defined() || tensor.numel() < words) tensor = allocate_zeros({words}, at::kLong);
  return tensor;
}

}  // namespace batchnorm_cuda
