// Between the files that plan a team: its layout (plan_team_layout.cpp), its cost (plan_costs.cpp)
// and the choice among teams (plan_team.cpp). Pure, like plan.h.
#pragma once

#include <string>
#include <vector>

#include "plan.h"
#include "plan_costs.h"
#include "plan_rows.h"

namespace batchnorm_cuda {

// Width of a slab of channels along C: 128 bytes, a cache line, or where that does not fit the
// chip 64 bytes, two sectors. Two lines where every other row starts in mid-sector.
constexpr int kSlabWindows = 8, kNarrowSlabWindows = 4, kWideSlabWindows = 2 * kSlabWindows;

// A problem in the eyes of the team planner, with one access pattern.
struct TeamRequest {
  const Problem& problem;
  const DeviceInfo& device;
  const PlanOptions& options;
  const CostModel& costs;
  Pattern pattern;
  bool exact;      // full windows only
  int vec;         // elements of a window
  int tensors;     // kept on chip: x, or dy and x
  int passing;     // beside these: the outputs, and a residual
  int fields;      // of an accumulator
  int channels;    // per thread: one, or one a lane
  RowLayout rows;  // along a row
};

// Threads and windows of a team's traversal, before it is split over blocks. `slab`: windows of a
// slab along C at most.
Traversal team_traversal(const TeamRequest& request, int slab);

// Units that are split over a team: windows of a channel, or rows.
int64_t team_work(const Traversal& traversal, Pattern pattern);

// Threads of a block among which the units of its part are dealt.
int team_members(const Traversal& traversal, Pattern pattern);

// Of a team of `size` blocks, those for which the even parts leave work.
int64_t ranks_with_work(const TeamRequest& request, const Traversal& base, int64_t size);

// Completes a team of `size` blocks; false where the device has no room for it.
bool build_team(const TeamRequest& request, const Traversal& base, Scope scope, int64_t size,
                Team& team);

// Moves of a plan of either strategy (plan_costs.h).
PlanCost team_cost(const TeamRequest& request, const Team& team);
PlanCost two_pass_cost(const Plan& stages, const Problem& problem, const DeviceInfo& device,
                       const CostModel& costs);

// The best team for the problem, or one with size 0 where there is none; `reason` says why.
struct TeamChoice {
  Team team;
  PlanCost cost;
  std::string reason;
};
TeamChoice plan_team(const Problem& problem, const DeviceInfo& device, const PlanOptions& options,
                     const CostModel& costs, double two_pass_cost);

// What forces each team that plan_team looks at, under `options` and besides.
std::vector<PlanOptions> team_candidates(const Problem& problem, const DeviceInfo& device,
                                         const PlanOptions& options);

}  // namespace batchnorm_cuda
