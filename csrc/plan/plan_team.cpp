// The choice of a team: how many blocks share a channel group, and how much each thread holds. Part
// of the plan (plan.h).
//
// The least cost decides (plan_costs.h), among teams and between the best of them and two passes.
#include "plan_team.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace batchnorm_cuda {
namespace {

// Places for blocks that may idle, of all over all rounds, without a word in the plan's reason.
constexpr double kIdleUnexplained = 0.1;

constexpr Scope kScopes[] = {Scope::kBlock, Scope::kCluster, Scope::kGrid};

bool all_aligned(const Problem& p) {
  return p.output_shift == 0 && p.input_shift <= 0 && p.grad_output_shift <= 0 &&
         p.residual_shift <= 0;
}

bool along_c_is_exact(const Problem& p, int vec) { return all_aligned(p) && p.c % vec == 0; }

TeamRequest make_request(const Problem& p, const DeviceInfo& device, const PlanOptions& options,
                         const CostModel& costs, Pattern pattern, const RowLayout& rows = {}) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  const int vec = kWindowBytes / dtype_bytes(p.dtype);
  const bool exact =
      pattern == Pattern::kAlongS ? all_aligned(p) && p.s % vec == 0 : rows.channels == 0;
  const int channels = pattern == Pattern::kAlongS ? 1 : vec;
  const int passing = p.outputs + (p.residual_shift >= 0);
  return {p,   device,          options, costs,           pattern,  exact,
          vec, forward ? 1 : 2, passing, forward ? 4 : 2, channels, rows};
}

// Share of the places for blocks that are empty, over all rounds.
double idle_share(const Team& team, const DeviceInfo& device) {
  const int64_t places = int64_t{team.blocks_per_sm} * device.sm_count;
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
  if (p.n == 0 || p.c == 0 || p.s == 0) return "there is nothing to do";
  if (is_double_backward(p.op)) return "the double backward has no team kernel";
  if (p.op == Op::kForwardEval) return "eval forward reads its input once anyway";
  if (p.output_shift < 0) return "no elementwise output is wanted";
  if (p.op == Op::kBackwardEval && !p.need_sums) return "no sums are wanted";
  if (options.index_bits == 64) return "64-bit indices are forced";
  if (!all_aligned(p)) return "misaligned tensors: not all begin on a 16-byte boundary";
  return "";
}

// Team sizes to look at: what a cluster is, and every size for which a whole number of teams fills
// the device's places.
std::vector<int64_t> team_sizes(const TeamRequest& r, const Traversal& t) {
  if (r.options.team_size > 0) return {r.options.team_size};
  std::vector<int64_t> sizes = {1, 2, 4, 8};
  const int64_t places = int64_t{kTeamBlocksPerSm} * r.device.sm_count;
  for (int64_t teams = 1; teams <= std::min(t.channel_blocks, places); ++teams) {
    const int64_t size = places / teams;
    if (size <= 8) break;
    const int64_t busy = ranks_with_work(r, t, size);
    if (busy > 8 && busy != sizes.back()) sizes.push_back(busy);
  }
  for (int64_t size = 3; size < 8; ++size) {
    if (size != 4 && size > r.device.max_cluster) sizes.push_back(size);
  }
  return sizes;
}

// The best team so far; of equals, the first.
struct Choice {
  Team team{};
  PlanCost cost{std::numeric_limits<double>::infinity()};

  void offer(const TeamRequest& r, const Team& candidate) {
    const PlanCost candidate_cost = team_cost(r, candidate);
    if (candidate_cost.total() >= cost.total()) return;
    team = candidate;
    cost = candidate_cost;
  }
};

// Widths of a slab of channels along C, the best first; along S there is none. Every other row of
// an odd number of windows starts in mid-sector, and costs each slab a sector more.
std::vector<int> slab_widths(const TeamRequest& r) {
  if (r.pattern != Pattern::kAlongC) return {kSlabWindows};
  if (r.options.slab > 0) return {std::min(r.options.slab, kWideSlabWindows)};
  if (r.problem.c / r.vec % 2 == 0) return {kSlabWindows, kNarrowSlabWindows};
  return {kWideSlabWindows, kSlabWindows, kNarrowSlabWindows};
}

// A walk of the threads over the tensor, for teams of any size.
struct Walk {
  TeamRequest request;
  int slab;
};

// The walks that suit the tensor, the best first.
std::vector<Walk> walks_of(const Problem& problem, const DeviceInfo& device,
                           const PlanOptions& options, const CostModel& costs) {
  const int vec = kWindowBytes / dtype_bytes(problem.dtype);
  const auto wanted = [&](Pattern pattern) { return options.pattern.value_or(pattern) == pattern; };
  std::vector<Walk> walks;
  const RowLayout rows = choose_rows(problem, vec, kTeamThreads);
  if (rows.elements > 0 && wanted(Pattern::kAlongRow)) {
    walks.push_back({make_request(problem, device, options, costs, Pattern::kAlongRow, rows), 0});
  }
  const Pattern pattern = problem.s > 1 ? Pattern::kAlongS : Pattern::kAlongC;
  const bool whole = problem.s > 1 || along_c_is_exact(problem, vec);
  if (!whole || !wanted(pattern)) return walks;
  const TeamRequest request = make_request(problem, device, options, costs, pattern);
  for (const int slab : slab_widths(request)) walks.push_back({request, slab});
  return walks;
}

// Can teams of so many blocks exchange in this way, and may they?
bool has_scope(const TeamRequest& r, Scope scope, int64_t size) {
  if (size == 1) return scope == Scope::kBlock;
  if (r.options.scope != Scope::kAuto && r.options.scope != scope) return false;
  return scope == Scope::kCluster ? size <= r.device.max_cluster
                                  : scope == Scope::kGrid && r.device.cooperative;
}

// Offers all teams of one walk: the one enumeration, of what is chosen from and what is listed.
template <typename Offer>
void offer_teams(const Walk& walk, const Offer& offer) {
  const TeamRequest& r = walk.request;
  const Traversal base = team_traversal(r, walk.slab);
  if (!fits_32_bits(r, base)) return;
  const bool shares_block = r.pattern == Pattern::kAlongS && base.threads_x < kTeamThreads;
  for (const int64_t size : team_sizes(r, base)) {
    if (shares_block && size > 1) continue;
    for (const Scope scope : kScopes) {
      Team team;
      if (!has_scope(r, scope, size)) continue;
      if (build_team(r, base, scope, size, team)) offer(r, team);
    }
  }
}

std::string reason_without_team(const Problem& p) {
  const bool whole = p.s > 1 || along_c_is_exact(p, kWindowBytes / dtype_bytes(p.dtype));
  return whole ? "no team fits, or the tensor needs 64-bit indices"
               : "channels last whose rows make no whole windows, or begin off 16-byte boundaries";
}

std::string reason_for_two_passes(const Team& best) {
  return best.streamed_bytes == 0
             ? "two passes cost less than a team that holds each channel group"
             : "no team holds a channel group, and two passes cost less than reading part of it "
               "again";
}

std::string reason_for(const Team& team, const DeviceInfo& device) {
  std::string reason = team.streamed_bytes == 0 ? "a team holds each channel group on chip"
                                                : "a team holds part of each channel group on chip";
  const double idle = idle_share(team, device);
  if (idle > kIdleUnexplained) {
    reason += "; " + std::to_string(static_cast<int>(idle * 100 + 0.5)) +
              "% of the places for blocks idle: teams that leave fewer cost more";
  }
  return reason;
}

}  // namespace

TeamChoice plan_team(const Problem& problem, const DeviceInfo& device, const PlanOptions& options,
                     const CostModel& costs, double two_pass_cost) {
  std::string reason = unsuitable(problem, options);
  if (!reason.empty()) return {{}, {}, reason};
  Choice choice;
  for (const Walk& walk : walks_of(problem, device, options, costs)) {
    offer_teams(walk, [&](const TeamRequest& r, const Team& team) { choice.offer(r, team); });
  }
  if (choice.team.size == 0) return {{}, {}, reason_without_team(problem)};
  if (options.strategy != Strategy::kTeam && choice.cost.total() >= two_pass_cost) {
    return {{}, {}, reason_for_two_passes(choice.team)};
  }
  return {choice.team, choice.cost, reason_for(choice.team, device)};
}

std::vector<PlanOptions> team_candidates(const Problem& given, const DeviceInfo& device,
                                         const PlanOptions& options) {
  const Problem problem = in_one_run(given);
  std::vector<PlanOptions> found;
  if (!unsuitable(problem, options).empty()) return found;
  const CostModel costs;  // of no matter: nothing is chosen
  for (const Walk& walk : walks_of(problem, device, options, costs)) {
    offer_teams(walk, [&](const TeamRequest& r, const Team& team) {
      PlanOptions forced = options;
      forced.strategy = Strategy::kTeam;
      forced.scope = team.scope;
      forced.team_size = team.size;
      forced.pattern = team.pattern;
      forced.slab = r.pattern == Pattern::kAlongC ? walk.slab : 0;
      found.push_back(forced);
    });
  }
  return found;
}

}  // namespace batchnorm_cuda
