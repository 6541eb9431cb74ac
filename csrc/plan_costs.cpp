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

// Moves on the busiest SM, of `blocks` equal blocks of so many moves each.
double busiest_moves(double per_block, int64_t blocks, const DeviceInfo& device,
                     const CostModel& costs) {
  const double mean = per_block * static_cast<double>(blocks) / device.sm_count;
  const auto on_busiest = static_cast<double>(ceil_div(blocks, device.sm_count));
  return std::max(mean, per_block * on_busiest / costs.sm_rate);
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

// Moves of a round beside those of data.
double empty_round(const TeamRequest& r, const Team& team, const WalkCost& walk) {
  const double code = r.tensors == 1 ? walk.round.forward : walk.round.backward;
  return code * (dtype_bytes(r.problem.dtype) > 2 ? r.costs.wide : 1.0) + exchange_cost(r, team);
}

}  // namespace

double team_cost(const TeamRequest& r, const Team& team) {
  const Traversal& t = team.traversal;
  const WalkCost& walk = walk_cost(r.costs, r.pattern, r.exact);
  const double streamed = static_cast<double>(team.streamed_bytes) /
                          static_cast<double>(t.numel * dtype_bytes(r.problem.dtype));
  const double windows = static_cast<double>(t.per_split) *
                         (r.pattern == Pattern::kAlongS ? t.threads_y : t.threads_x);
  const double moves =
      windows / kMoveThreads * (r.tensors + r.passing + streamed * r.costs.streamed);
  const bool narrow = r.pattern == Pattern::kAlongC && t.threads_x < kSlabWindows;
  const double rate = walk.rate * (narrow ? r.costs.narrow : 1.0);
  const int64_t places = int64_t{team.blocks_per_sm} * r.device.sm_count;
  const int64_t groups = t.channel_blocks;
  const int64_t at_once = std::min(groups, team.scope == Scope::kBlock ? places : team.teams);
  const auto round = [&](int64_t teams) {
    return busiest_moves(moves, teams * team.size, r.device, r.costs) * rate +
           empty_round(r, team, walk);
  };
  const int64_t last = groups % at_once;
  return r.costs.launch + static_cast<double>(groups / at_once) * round(at_once) +
         (last > 0 ? round(last) : 0.0);
}

double two_pass_cost(const Plan& stages, const Problem& p, const DeviceInfo& device,
                     const CostModel& costs) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  const int tensors = forward ? 1 : 2;
  const int passing = p.outputs + (p.residual_shift >= 0);
  const double all = static_cast<double>(p.n * p.c * p.s) / stages.vec / kMoveThreads;
  const auto moves = [&](const Traversal& t, int tensors) {
    return busiest_moves(all / static_cast<double>(t.tasks) * tensors, t.tasks, device, costs);
  };
  double cost = stages.launches * costs.stage_launch;
  if (stages.has_reduce) {
    cost += moves(stages.reduce, tensors) * costs.reduce +
            static_cast<double>(stages.merge.rows) * costs.merge_row;
  }
  if (stages.has_elementwise) {
    const Traversal& t = stages.elementwise;
    const WalkCost& walk = walk_cost(costs, t.pattern, t.exact);
    cost += moves(t, tensors + passing) * walk.elementwise;
  }
  return cost;
}

}  // namespace batchnorm_cuda
