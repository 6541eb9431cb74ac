#include "plan_candidates.h"

#include <algorithm>

#include "plan_team.h"

namespace batchnorm_cuda {
namespace {

// Are these the same launches of the same problem?
bool same_plan(const Plan& a, const Plan& b) {
  if (a.strategy != b.strategy) return false;
  if (a.strategy == Strategy::kTwoPass) {
    return a.reduce.grid == b.reduce.grid && a.elementwise.grid == b.elementwise.grid;
  }
  return a.team.pattern == b.team.pattern && a.team.scope == b.team.scope &&
         a.team.size == b.team.size && a.team.traversal.threads_x == b.team.traversal.threads_x;
}

// Two passes, dealt as the planner would, and in about half and twice as many parts.
std::vector<PlanOptions> two_pass_candidates(const Problem& problem, const DeviceInfo& device,
                                             PlanOptions options) {
  options.strategy = Strategy::kTwoPass;
  std::vector<PlanOptions> found = {options};
  if (options.splits > 0) return found;
  const Plan plan = make_plan(problem, device, options);
  const int64_t splits = plan.has_reduce ? plan.reduce.splits : plan.elementwise.splits;
  for (const int64_t wanted : {splits / 2, 2 * splits}) {
    options.splits = wanted;
    if (wanted > 0) found.push_back(options);
  }
  return found;
}

}  // namespace

std::vector<PlanCandidate> plan_candidates(const Problem& problem, const DeviceInfo& device,
                                           const PlanOptions& options, const CostModel& costs) {
  const Plan chosen = make_plan(problem, device, options, costs);
  std::vector<PlanOptions> forced;
  if (options.strategy != Strategy::kTwoPass) forced = team_candidates(problem, device, options);
  if (options.strategy != Strategy::kTeam || forced.empty()) {
    const auto stages = two_pass_candidates(problem, device, options);
    forced.insert(forced.end(), stages.begin(), stages.end());
  }
  std::vector<PlanCandidate> found;
  for (const PlanOptions& each : forced) {
    const Plan plan = make_plan(problem, device, each, costs);
    const bool known = std::any_of(found.begin(), found.end(), [&](const PlanCandidate& other) {
      return same_plan(other.plan, plan);
    });
    if (!known) found.push_back({each, plan, same_plan(plan, chosen)});
  }
  return found;
}

}  // namespace batchnorm_cuda
