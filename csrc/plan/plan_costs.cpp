// What a plan costs: the time of the busiest SM in moves (plan_costs.h). The one home of the
// formula.
#include <algorithm>

#include "plan_team.h"

namespace batchnorm_cuda {
namespace {

constexpr double kMoveThreads = 512;
constexpr double kMoveBytes = kMoveThreads * kWindowBytes;

const WalkCost& walk_cost(const CostModel& costs, Pattern pattern, bool exact) {
  if (pattern == Pattern::kAlongC) return costs.along_c;
  if (pattern == Pattern::kAlongRow) return costs.along_row;
  return exact ? costs.along_s : costs.runs;
}

// Moves beyond an even share on the busiest SM, of `blocks` equal blocks of so many moves each.
double idle_moves(double per_block, int64_t blocks, const DeviceInfo& device,
                  const CostModel& costs) {
  const double even = per_block * static_cast<double>(blocks) / device.sm_count;
  const auto on_busiest = static_cast<double>(ceil_div(blocks, device.sm_count));
  return std::max(per_block * on_busiest / costs.sm_rate - even, 0.0);
}

double exchange_cost(const TeamRequest& r, const Team& team) {
  if (team.scope == Scope::kBlock) return 0;
  if (team.scope == Scope::kCluster) return r.costs.cluster_wait;
  const double slot = static_cast<double>(team.slot_values * acc_bytes(r.problem.dtype));
  const double blocks = team.blocks_per_sm;  // each reads them for itself
  const double read = (team.two_level ? 2.0 : static_cast<double>(team.size)) * slot;
  const double wait = r.costs.grid_wait + r.costs.grid_flag * team.size;
  return wait * (team.two_level ? 2 : 1) + read * blocks / (kMoveBytes * r.costs.slot_rate);
}

}  // namespace

PlanCost team_cost(const TeamRequest& r, const Team& team) {
  const Traversal& t = team.traversal;
  const WalkCost& walk = walk_cost(r.costs, r.pattern, r.exact);
  const double streamed = static_cast<double>(team.streamed_bytes) /
                          static_cast<double>(t.numel * dtype_bytes(r.problem.dtype));
  const double windows = static_cast<double>(t.per_split) *
                         (r.pattern == Pattern::kAlongS ? t.threads_y : t.threads_x);
  const bool narrow = r.pattern == Pattern::kAlongC && t.threads_x < kSlabWindows;
  const double per_window = walk.rate * (narrow ? r.costs.narrow : 1.0) / kMoveThreads;
  const double once = windows * (r.tensors + r.passing) * per_window;
  const double again = windows * streamed * r.costs.streamed * per_window;
  const double code = (r.tensors == 1 ? walk.round.forward : walk.round.backward) *
                      (dtype_bytes(r.problem.dtype) > 2 ? r.costs.wide : 1.0);
  const double exchange = exchange_cost(r, team);
  const int64_t groups = t.channel_blocks, places = int64_t{team.blocks_per_sm} * r.device.sm_count;
  const int64_t at_once = std::min(groups, team.scope == Scope::kBlock ? places : team.teams);
  PlanCost cost;
  cost.launches = r.costs.launch;
  const auto add_rounds = [&](int64_t count, int64_t teams) {
    const auto rounds = static_cast<double>(teams > 0 ? count : 0);
    const int64_t blocks = teams * team.size;
    const double even = static_cast<double>(blocks) / r.device.sm_count;
    cost.transfers += rounds * once * even;
    cost.rereads += rounds * again * even;
    cost.idle += rounds * idle_moves(once + again, blocks, r.device, r.costs);
    cost.code += rounds * code;
    cost.waits += rounds * exchange;
  };
  add_rounds(groups / at_once, at_once);
  add_rounds(1, groups % at_once);
  return cost;
}

PlanCost two_pass_cost(const Plan& stages, const Problem& p, const DeviceInfo& device,
                       const CostModel& costs) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  const int tensors = forward ? 1 : 2;
  const int passing = p.outputs + (p.residual_shift >= 0);
  const double all = static_cast<double>(p.n * p.c * p.s) / stages.vec / kMoveThreads;
  PlanCost cost;
  const auto add_pass = [&](const Traversal& t, int tensors, double rate, double& moves) {
    moves += all * tensors * rate / device.sm_count;
    const double per_block = all * tensors * rate / static_cast<double>(t.grid);
    cost.idle += idle_moves(per_block, t.grid, device, costs);
  };
  cost.launches = stages.launches * costs.stage_launch;
  if (stages.has_reduce) {
    add_pass(stages.reduce, tensors, costs.reduce, cost.rereads);
    cost.waits = static_cast<double>(stages.merge.rows) * costs.merge_row;
  }
  if (stages.has_elementwise) {
    const Traversal& t = stages.elementwise;
    const double rate = walk_cost(costs, t.pattern, t.exact).elementwise;
    add_pass(t, tensors + passing, rate, cost.transfers);
  }
  return cost;
}

}  // namespace batchnorm_cuda
