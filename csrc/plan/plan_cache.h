// What plans are made with, and the plans of a thread's last problems: planning takes microseconds,
// a training step repeats.
#pragma once

#include "plan.h"

namespace batchnorm_cuda {

// What the planner is told to force, for tests and benchmarks; process-wide.
void set_plan_options(const PlanOptions& options);
PlanOptions plan_options();

// make_plan(problem, device, options), worked out once. The reference holds until the next call by
// the same thread.
const Plan& cached_plan(const Problem& problem, const DeviceInfo& device,
                        const PlanOptions& options);

}  // namespace batchnorm_cuda
