// What ops.cpp needs to know of the device a tensor lives on. csrc/device_context.cpp answers for
// CUDA; the host build brings an answer of its own for CPU tensors.
#pragma once

#include <c10/core/Device.h>

#include "launch.h"
#include "plan.h"

namespace batchnorm_cuda {

// The device type whose tensors the kernels of this build take.
c10::DeviceType supported_device_type();

// Properties of the device, queried once per device and process.
const DeviceInfo& device_info(c10::Device device);

// The stream that torch work on the device goes to at present, in this thread.
cudaStream_t current_stream(c10::Device device);

}  // namespace batchnorm_cuda
