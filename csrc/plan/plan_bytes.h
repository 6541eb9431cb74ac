// The bytes that a plan's kernels move between DRAM and chip.
#pragma once

#include "plan.h"

namespace batchnorm_cuda {

// Fills in compulsory_bytes, reread_bytes and predicted_bytes of a plan that is complete otherwise.
void predict_bytes(Plan& plan, const Problem& problem, const DeviceInfo& device);

}  // namespace batchnorm_cuda
