// What the operators need to know of the device a tensor lives on. device_context.cpp answers for
// CUDA; the host build brings an answer of its own for CPU tensors.
#pragma once

#include <c10/core/Device.h>

#include "../launch.h"
#include "../plan/plan.h"

namespace at {
class Tensor;
}

namespace batchnorm_cuda {

// The device type whose tensors the kernels of this build take.
c10::DeviceType supported_device_type();

// Properties of the device, queried once per device and process, less what it refused since.
const DeviceInfo& device_info(c10::Device device);

// Plans no teams of this scope on the device from now on, in the whole process.
void refuse_scope(c10::Device device, Scope scope);

// The stream that torch work on the device goes to at present, in this thread.
cudaStream_t current_stream(c10::Device device);

// `words` 64-bit words in device memory for launches on the device's current stream to order their
// blocks by: zero at first, then as the last launch on the stream left them. While a graph is being
// captured they are fresh, and zeroed by the graph itself, because a replay runs on any stream.
at::Tensor sync_words(c10::Device device, int64_t words);

}  // namespace batchnorm_cuda
