// What a plan costs: the time of the busiest SM in moves (plan_costs.h). The one home of the
// formula.
#include <algorithm>

#include "plan_team.h"

namespace batchnorm_cuda {
namespace {

constexpr double kMoveThreads = 512;
constexpr double kMoveBytes = kMoveThreads * kWindowBytes;

double exchange_cost(const TeamRequest& r, const Team& team) {
  if (team.scope == Scope::kBlock) return 0;
  const double slot = static_cast<double>(team.slot_values * acc_bytes(r.problem.dtype));
  const double blocks = team.blocks_per_sm;  // each reads them for itself
  const double read = (team.two_level ? 2.0 : static_cast<double>(team.size)) * slot;
  const double wait = team.scope == Scope::kCluster ? r.costs.cluster_wait : r.costs.grid_wait;
  return wait * (team.two_level ? 2 : 1) + read * blocks / (kMoveBytes * r.costs.slot_rate);
}

// Moves of one round in which `blocks` blocks are at work.
double round_cost(const TeamRequest& r, const Team& team, int64_t blocks) {
  const Traversal& t = team.traversal;
  const int members = team_members(t, r.pattern);
  const double held = static_cast<double>(t.per_split) / members;
  const double capacity = team.register_windows + team.shared_windows;
  const double moves = held * (r.tensors + r.passing) + std::max(0.0, held - capacity) * r.tensors;
  const double per_block = moves * kTeamThreads / kMoveThreads;
  const double sms = r.device.sm_count;
  const auto on_busiest = static_cast<double>(ceil_div(blocks, r.device.sm_count));
  const bool shared = on_busiest > 1 && blocks > team.size;  // by blocks of several teams
  const double latency = r.costs.latency + exchange_cost(r, team);
  const double moving = std::max(per_block * static_cast<double>(blocks) / sms,
                                 per_block * on_busiest / r.costs.sm_rate);
  return moving + latency * (shared ? r.costs.exposed : 1.0);
}

}  // namespace

double team_cost(const TeamRequest& r, const Team& team) {
  const int64_t groups = team.traversal.channel_blocks;
  const int64_t places = int64_t{team.blocks_per_sm} * r.device.sm_count;
  const int64_t at_once =
      team.scope == Scope::kBlock ? std::min(groups, places) : std::min(groups, team.teams);
  const int64_t last = groups % at_once;
  double cost = static_cast<double>(groups / at_once) * round_cost(r, team, at_once * team.size);
  if (last > 0) cost += round_cost(r, team, last * team.size);
  return cost + r.costs.launch;
}

// What a team holds twice, all else once.
double two_pass_cost(const Plan& stages, const Problem& p, const DeviceInfo& device,
                     const CostModel& costs) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  const int reads = (forward ? 1 : 2) * (stages.has_reduce ? 2 : 1);
  const int passing = p.outputs + (p.residual_shift >= 0);
  const double windows = static_cast<double>(p.n * p.c * p.s) / stages.vec / kMoveThreads;
  return windows / device.sm_count * (reads + passing) + stages.launches * costs.launch;
}

}  // namespace batchnorm_cuda
