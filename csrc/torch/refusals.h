// What becomes of a call whose team kernel was refused (launch.h).
#pragma once

#include <c10/core/Device.h>

#include "../launch.h"
#include "../plan/plan_cache.h"
#include "device_context.h"
#include "tensors.h"

namespace batchnorm_cuda {

// The plan to go on with, after `status` refused `team`; to be held as cached_plan's. Warns once in
// a process. A device that refused a launch is planned without teams of that scope from now on: all
// calls then take one path, and none asks in vain. A kernel that did not fit is planned in two
// passes for this problem alone.
const Plan& plan_after_refusal(const Problem& problem, c10::Device device, const Team& team,
                               LaunchStatus status);

// Runs the problem by a team, `launch(plan)`, if that is planned, and not refused. Null if it ran;
// else the plan of the stages that are to run.
template <typename Launch>
const Plan* plan_unless_team(const Problem& problem, c10::Device device, Launch&& launch) {
  const Plan* plan = &cached_plan(problem, device_info(device), plan_options());
  while (plan->strategy == Strategy::kTeam) {
    const LaunchStatus status = launch(*plan);
    if (!is_refused(status)) {
      check_launch(status, "team_kernel");
      return nullptr;
    }
    plan = &plan_after_refusal(problem, device, plan->team, status);
  }
  return plan;
}

}  // namespace batchnorm_cuda
