// Device properties as the planner sees them, from the CUDA runtime (no torch).
#pragma once

#include "launch.h"
#include "plan/plan.h"

namespace batchnorm_cuda {

// Fills `info` for CUDA device `device`; returns the runtime's error, 0 on success.
LaunchStatus query_device(int device, DeviceInfo* info);

}  // namespace batchnorm_cuda
