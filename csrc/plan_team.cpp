// The choice of a team: how many blocks share a channel group, and how much each thread holds. Part
// of the plan (plan.h).
//
// A team that reads everything once comes before any that does not. Among those that do, and among
// the rest together with the stage kernels, the least cost decides: the time of the busiest SM in
// moves, where a move is 8 KB, one 16-byte access by each of 512 threads, at the SM's share of the
// device's bandwidth. Only ratios matter, and only between choices for one problem.
#include "plan_team.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace batchnorm_cuda {
namespace {

constexpr double kMoveThreads = 512;
constexpr double kMoveBytes = kMoveThreads * kWindowBytes;
// Cost of a wait for other blocks. A cycle-level simulation put a round through global memory at
// about 1100 cycles, in which an SM moves about 16 KB; a cluster at a third.
constexpr double kGridWait = 2.0, kClusterWait = 0.7;
// Slots are read from the L2 cache, at about twice the rate of DRAM.
constexpr double kSlotRate = 2.0;
// From the first load of a round to its use.
constexpr double kLatency = 1.0;
// Share of latencies and waits that still shows where another team's block on the SM fills them.
constexpr double kExposed = 0.5;
// What an SM can move of its share of the bandwidth while others are idle.
constexpr double kSmRate = 1.3;
// A launch more, or a device-wide drain (about 3 microseconds).
constexpr double kLaunchCost = 5.0;
// Places for blocks that may idle, of all over all rounds, without a word in the plan's reason.
constexpr double kIdleUnexplained = 0.1;

constexpr Depth kDepths[] = {Depth::kMiddle, Depth::kDeep, Depth::kStream};

bool all_aligned(const Problem& p) {
  return p.output_shift == 0 && p.input_shift <= 0 && p.grad_output_shift <= 0 &&
         p.residual_shift <= 0;
}

bool along_c_is_exact(const Problem& p, int vec) { return all_aligned(p) && p.c % vec == 0; }

TeamRequest make_request(const Problem& p, const DeviceInfo& device, const PlanOptions& options,
                         Pattern pattern, const RowLayout& rows = {}) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  const int vec = kWindowBytes / dtype_bytes(p.dtype);
  const bool exact =
      pattern == Pattern::kAlongS ? all_aligned(p) && p.s % vec == 0 : rows.channels == 0;
  const int channels = pattern == Pattern::kAlongS ? 1 : vec;
  const int passing = p.outputs + (p.residual_shift >= 0);
  return {p,       device,          options,  pattern, exact, vec, forward ? 1 : 2,
          passing, forward ? 4 : 2, channels, rows};
}

double exchange_cost(const TeamRequest& r, const Team& team) {
  if (team.scope == Scope::kBlock) return 0;
  const double slot = static_cast<double>(team.slot_values * acc_bytes(r.problem.dtype));
  const double blocks = team.blocks_per_sm;  // each reads them for itself
  const double read = (team.two_level ? 2.0 : static_cast<double>(team.size)) * slot;
  const double wait = team.scope == Scope::kCluster ? kClusterWait : kGridWait;
  return wait * (team.two_level ? 2 : 1) + read * blocks / (kMoveBytes * kSlotRate);
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
  const double latency = kLatency + exchange_cost(r, team);
  return std::max(per_block * static_cast<double>(blocks) / sms, per_block * on_busiest / kSmRate) +
         latency * (shared ? kExposed : 1.0);
}

double team_cost(const TeamRequest& r, const Team& team) {
  const int64_t groups = team.traversal.channel_blocks;
  const int64_t places = int64_t{team.blocks_per_sm} * r.device.sm_count;
  const int64_t at_once =
      team.scope == Scope::kBlock ? std::min(groups, places) : std::min(groups, team.teams);
  const int64_t last = groups % at_once;
  double cost = static_cast<double>(groups / at_once) * round_cost(r, team, at_once * team.size);
  if (last > 0) cost += round_cost(r, team, last * team.size);
  return cost + kLaunchCost;
}

// The stage kernels' cost in the same unit: what a team holds twice, all else once.
double two_pass_cost(const TeamRequest& r) {
  const double windows =
      static_cast<double>(r.problem.n * r.problem.c * r.problem.s) / r.vec / kMoveThreads;
  return windows / r.device.sm_count * (2 * r.tensors + r.passing) + 3 * kLaunchCost;
}

// Share of the places for blocks that are empty, over all rounds.
double idle_share(const TeamRequest& r, const Team& team) {
  const int64_t places = int64_t{team.blocks_per_sm} * r.device.sm_count;
  const int64_t at_once = team.scope == Scope::kBlock ? places : team.grid;
  const int64_t waves = ceil_div(team.traversal.tasks, at_once);
  return 1.0 - static_cast<double>(team.traversal.tasks) / static_cast<double>(waves * places);
}

bool fits_32_bits(const TeamRequest& r, const Traversal& t) {
  if (t.row_windows == 0) return false;
  const int64_t step = r.pattern == Pattern::kAlongS ? (t.threads_x / t.row_windows + 2) * t.c * t.s
                                                     : int64_t{t.threads_y} * t.row_windows * r.vec;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  return step <= kLimit / 2 && t.numel + t.row_windows * r.vec + r.vec <= kLimit - step;
}

std::string unsuitable(const Problem& p, const PlanOptions& options) {
  if (p.op == Op::kForwardEval) return "eval forward reads its input once anyway";
  if (p.output_shift < 0) return "no elementwise output is wanted";
  if (p.op == Op::kBackwardEval && !p.need_sums) return "no sums are wanted";
  if (options.index_bits == 64) return "64-bit indices are forced";
  if (!all_aligned(p)) return "misaligned tensors: not all begin on a 16-byte boundary";
  return "";
}

// Team sizes to look at: what a cluster is, and every size for which a whole number of teams fills
// the device's places.
std::vector<int64_t> team_sizes(const TeamRequest& r, const Traversal& t, Depth depth) {
  if (r.options.team_size > 0) return {r.options.team_size};
  std::vector<int64_t> sizes = {1, 2, 4, 8};
  const int64_t places = int64_t{team_blocks_per_sm(depth)} * r.device.sm_count;
  for (int64_t teams = 1; teams <= std::min(t.channel_blocks, places); ++teams) {
    const int64_t size = places / teams;
    if (size <= 8) break;
    if (size != sizes.back()) sizes.push_back(size);
  }
  for (int64_t size = 3; size < 8; ++size) {
    if (size != 4 && size > r.device.max_cluster) sizes.push_back(size);
  }
  return sizes;
}

// The best team so far.
struct Choice {
  Team team;
  double cost = std::numeric_limits<double>::infinity();
  bool once = false;  // reads everything once

  void offer(const TeamRequest& r, const Team& candidate) {
    const bool reads_once = candidate.streamed_bytes == 0;
    if (once && !reads_once) return;
    const double candidate_cost = team_cost(r, candidate);
    if ((reads_once && !once) || candidate_cost < cost) {
      team = candidate;
      cost = candidate_cost;
      once = reads_once;
    }
  }
};

// Widths of a slab of channels along C, the best first; along S there is none. Every other row of
// an odd number of windows starts in mid-sector, and costs each slab a sector more.
std::vector<int> slab_widths(const TeamRequest& r) {
  if (r.pattern != Pattern::kAlongC) return {kSlabWindows};
  if (r.problem.c / r.vec % 2 == 0) return {kSlabWindows, kNarrowSlabWindows};
  return {2 * kSlabWindows, kSlabWindows, kNarrowSlabWindows};
}

// Offers all teams of one access pattern and slab width.
void offer_teams(const TeamRequest& r, int slab, Choice& choice) {
  const Traversal base = team_traversal(r, slab);
  if (!fits_32_bits(r, base)) return;
  const bool shares_block = r.pattern == Pattern::kAlongS && base.threads_x < kTeamThreads;
  for (const Depth depth : kDepths) {
    if (windows_of(r, depth) == 0) continue;
    if (depth == Depth::kStream && choice.once) continue;
    for (const int64_t size : team_sizes(r, base, depth)) {
      Team team;
      if (shares_block && size > 1) continue;
      if (build_team(r, base, depth, size, team)) choice.offer(r, team);
    }
  }
}

}  // namespace

Team plan_team(const Problem& problem, const DeviceInfo& device, const PlanOptions& options,
               std::string* reason) {
  Choice choice;
  choice.team.size = 0;
  *reason = unsuitable(problem, options);
  if (!reason->empty()) return choice.team;
  const int vec = kWindowBytes / dtype_bytes(problem.dtype);
  const bool whole = problem.s > 1 || along_c_is_exact(problem, vec);
  const RowLayout rows =
      all_aligned(problem) ? choose_rows(problem, vec, kTeamThreads) : RowLayout{};
  if (rows.elements > 0) {
    offer_teams(make_request(problem, device, options, Pattern::kAlongRow, rows), 0, choice);
  }
  const TeamRequest r =
      make_request(problem, device, options, problem.s > 1 ? Pattern::kAlongS : Pattern::kAlongC);
  if (choice.team.size == 0 && whole) {
    for (const int slab : slab_widths(r)) {
      if (!choice.once) offer_teams(r, slab, choice);
    }
  }
  if (choice.team.size == 0) {
    *reason =
        whole ? "no team fits, or the tensor needs 64-bit indices"
              : "channels last whose rows make no whole windows, or begin off 16-byte boundaries";
    return choice.team;
  }
  const bool forced = options.strategy == Strategy::kTeam;
  if (!choice.once && !forced && choice.cost >= two_pass_cost(r)) {
    *reason =
        "no team holds a channel group, and two passes cost less than reading part of it again";
    choice.team.size = 0;
    return choice.team;
  }
  *reason = choice.once ? "a team holds each channel group on chip"
                        : "a team holds part of each channel group on chip";
  const double idle = idle_share(r, choice.team);
  if (idle > kIdleUnexplained) {
    *reason += "; " + std::to_string(static_cast<int>(idle * 100 + 0.5)) +
               "% of the places for blocks idle: teams that leave fewer cost more";
  }
  return choice.team;
}

}  // namespace batchnorm_cuda
