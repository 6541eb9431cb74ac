// Device properties as the planner sees them, from the CUDA runtime alone (no torch).
#pragma once

#include "launch.h"
#include "plan.h"

namespace batchnorm_cuda {

// Fills in what clusters the current device takes, and how many (cluster_query.cu). To be called
// when the rest of `info` is there. A question that fails is answered by what is sure.
void query_clusters(DeviceInfo* info);

// Fills `info` for CUDA device `device`; returns the runtime's error, 0 on success.
LaunchStatus query_device(int device, DeviceInfo* info);

}  // namespace batchnorm_cuda
