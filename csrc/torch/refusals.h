// What becomes of a call whose team kernel was refused (launch.h).
#pragma once

#include <c10/core/Device.h>

#include "../launch.h"
#include "../plan/plan.h"

namespace batchnorm_cuda {

// The plan to go on with, after `status` refused `team`; to be held as cached_plan's. Warns once in
// a process. A device that refused a launch is planned without teams of that scope from now on: all
// calls then take one path, and none asks in vain. A kernel that did not fit is planned in two
// passes for this problem alone.
const Plan& plan_after_refusal(const Problem& problem, c10::Device device, const Team& team,
                               LaunchStatus status);

}  // namespace batchnorm_cuda
