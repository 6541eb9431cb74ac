// All plans among which the planner chooses, for whoever wants to time them.
#pragma once

#include <vector>

#include "plan.h"
#include "plan_costs.h"

namespace batchnorm_cuda {

struct PlanCandidate {
  PlanOptions options;  // by which make_plan gives this plan and no other
  Plan plan;
  bool chosen = false;  // without options beyond the given ones
};

// Every team, of every scope that its size allows, and two passes with a few
// numbers of splits. What `options` forces holds for all. Exactly one candidate is the chosen one.
std::vector<PlanCandidate> plan_candidates(const Problem& problem, const DeviceInfo& device,
                                           const PlanOptions& options = {},
                                           const CostModel& costs = {});

// make_plan of plan.h, whose choice is by the default costs.
Plan make_plan(const Problem& problem, const DeviceInfo& device, const PlanOptions& options,
               const CostModel& costs);

}  // namespace batchnorm_cuda
