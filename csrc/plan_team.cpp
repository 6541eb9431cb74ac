// The choice of a team: how many blocks share a channel group, how they exchange, and what each
// thread holds where. Part of the plan (plan.h): pure, and the only owner of this geometry.
//
// Candidates are compared by a cost in window moves per thread and SM, the time a thread's 16-byte
// access takes at full bandwidth. Only ratios matter, and only between choices for one problem.
#include <algorithm>
#include <limits>
#include <numeric>

#include "plan.h"

namespace batchnorm_cuda {
namespace {

// Cost of one exchange in window moves of an SM's 512 threads. A cycle-level simulation put a round
// through global memory at about 1100 cycles, in which an SM moves about 16 KB; a cluster at a
// third.
constexpr double kGridExchange = 2.0, kClusterExchange = 0.7;
// A launch more, or a device-wide drain, in the same unit (about 3 microseconds).
constexpr double kLaunchCost = 5.0;
constexpr int64_t kReservedSharedBytes = 1024;  // per block, by the system
constexpr int kMaxBlocksPerSm = 32;
// Width of a slab of channels along C: 128 bytes, four sectors, where C has that much.
constexpr int kSlabWindows = 8;
// Runs of up to this many bytes go along a row unless they are whole windows of whole sectors:
// beyond it the two shared sectors at a run's ends are under a tenth of it.
constexpr int64_t kShortRun = 640;
constexpr int64_t kSectorBytes = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two_at_least(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

struct Request {
  const Problem& problem;
  Pattern pattern;
  const DeviceInfo& device;
  const PlanOptions& options;
  bool exact;
  int vec, tensors, fields;
};

bool all_aligned(const Problem& p) {
  return p.output_shift == 0 && p.input_shift <= 0 && p.grad_output_shift <= 0;
}

// Columns that lie in one channel block along a row: whole channels, whole windows, at least a
// slab.
int64_t row_block_windows(const Problem& p, int vec) {
  const int64_t unit = std::lcm(p.s > 1 ? p.s : p.c, static_cast<int64_t>(vec)) / vec;
  return p.s > 1 ? unit * ceil_div(kSlabWindows, unit) : unit;
}

// The access pattern of a team: along S or C where whole windows are, along a row where runs are
// short or odd, or C is.
Pattern choose_pattern(const Problem& p, int vec) {
  const bool aligned = all_aligned(p);
  if (p.s == 1 && aligned && p.c % vec == 0) return Pattern::kAlongC;
  const int64_t bytes = p.s * dtype_bytes(p.dtype);
  const bool odd_run = p.s > 1 && (p.s % vec != 0 || bytes < kSectorBytes) && bytes <= kShortRun;
  const int64_t row = p.s > 1 ? p.c * p.s : std::lcm(p.c, static_cast<int64_t>(vec));
  const bool whole = aligned && row % vec == 0 && (p.n * p.c * p.s) % row == 0;
  if ((p.s == 1 || odd_run) && whole && row_block_windows(p, vec) <= kTeamThreads) {
    return Pattern::kAlongRow;
  }
  return p.s == 1 ? Pattern::kAlongC : Pattern::kAlongS;
}

void lay_out_along_s(const Request& r, Traversal& t) {
  t.row_windows = r.exact ? t.s / r.vec : ceil_div(t.s + r.vec - 1, r.vec);
  t.rows = t.n;
  const int64_t windows = t.rows * t.row_windows;
  const int64_t held = kTeamWindowsSmall / r.tensors;
  const int64_t threads = std::max(std::min<int64_t>(windows, kWarpSize), ceil_div(windows, held));
  t.threads_x = static_cast<int>(std::min<int64_t>(kTeamThreads, power_of_two_at_least(threads)));
  t.threads_y = kTeamThreads / t.threads_x;
  t.channel_blocks = ceil_div(t.c, t.threads_y);
}

void lay_out_along_c(const Request& r, Traversal& t) {
  t.row_windows = t.c / r.vec;
  t.rows = t.n;
  t.threads_x =
      static_cast<int>(std::min<int64_t>(kSlabWindows, power_of_two_at_least(t.row_windows)));
  t.threads_y = kTeamThreads / t.threads_x;
  t.channel_blocks = ceil_div(t.row_windows, t.threads_x);
}

void lay_out_along_row(const Request& r, Traversal& t) {
  const bool runs = t.s > 1;
  const int64_t row = runs ? t.c * t.s : std::lcm(t.c, static_cast<int64_t>(r.vec));
  t.row_windows = row / r.vec;
  t.rows = t.numel / row;
  t.row_repeat = runs ? 1 : row / t.c;
  t.threads_x = static_cast<int>(row_block_windows(r.problem, r.vec));
  t.threads_y = kTeamThreads / t.threads_x;
  t.channel_blocks = ceil_div(t.row_windows, t.threads_x);
  t.segment_size = runs ? t.s : t.row_repeat;
  t.segment_step = runs ? t.s : 1;
  t.segment_stride = runs ? 1 : t.c;
  t.segments = runs ? t.threads_x * r.vec / t.s : t.c;
}

// Threads and windows of the traversal, before it is split over a team.
Traversal base_traversal(const Request& r) {
  const Problem& p = r.problem;
  Traversal t;
  t.n = p.n;
  t.c = p.c;
  t.s = p.s;
  t.numel = p.n * p.c * p.s;
  t.shift = p.output_shift;
  t.exact = r.exact;
  t.index_bits = r.exact ? 32 : 64;
  if (r.pattern == Pattern::kAlongS) lay_out_along_s(r, t);
  if (r.pattern == Pattern::kAlongC) lay_out_along_c(r, t);
  if (r.pattern == Pattern::kAlongRow) lay_out_along_row(r, t);
  return t;
}

// Units that are split over a team: windows of a channel, or rows.
int64_t work_of(const Traversal& t, Pattern pattern) {
  return pattern == Pattern::kAlongS ? t.rows * t.row_windows : t.rows;
}

// The shared memory of a block: scratch of its reduction, slots of a cluster's exchange, windows.
void lay_out_shared(const Request& r, Team& team) {
  const Traversal& t = team.traversal;
  const int acc = acc_bytes(r.problem.dtype);
  const bool along_s = r.pattern == Pattern::kAlongS;
  const int lanes = along_s ? 1 : r.vec;
  const int64_t columns = int64_t{t.threads_x} * lanes;
  int64_t scratch = along_s ? int64_t{kTeamThreads / kWarpSize} * r.fields
                            : column_scratch_values(t.threads_x, t.threads_y, lanes, r.fields);
  team.slot_values = (along_s ? int64_t{t.threads_y} : columns) * r.fields;
  if (r.pattern == Pattern::kAlongRow) {
    scratch = std::max(scratch, (columns + t.segments) * r.fields);
    team.slot_values = t.segments * r.fields;
  }
  team.scratch_bytes = ceil_div(scratch * acc, kWindowBytes) * kWindowBytes;
  const int64_t slots = team.scope == Scope::kCluster ? 2 * team.slot_values * acc : 0;
  team.data_offset = team.scratch_bytes + ceil_div(slots, kWindowBytes) * kWindowBytes;
}

// Windows per thread that the block's part needs, and where they go. Registers first; shared memory
// as far as it leaves team.blocks_per_sm blocks resident.
void place_windows(const Request& r, Team& team, int64_t per_thread) {
  const int large = team_windows_large(r.pattern, r.exact);
  const bool small = team_has_small(r.pattern) && per_thread * r.tensors <= kTeamWindowsSmall;
  const int windows = small ? kTeamWindowsSmall : large;
  team.tensors = r.tensors;
  team.register_windows = windows / r.tensors;
  team.blocks_per_sm = kTeamBlocksPerSm;
  const int64_t room =
      std::min(r.device.shared_bytes_per_sm / team.blocks_per_sm - kReservedSharedBytes,
               r.device.shared_bytes_per_block_optin) -
      team.data_offset;
  const int64_t slot_bytes = int64_t{kTeamThreads} * kWindowBytes * r.tensors;
  const int64_t wanted = std::max<int64_t>(per_thread - team.register_windows, 0);
  team.shared_windows = static_cast<int>(std::clamp<int64_t>(room / slot_bytes, 0, wanted));
  team.shared_bytes = team.data_offset + team.shared_windows * slot_bytes;
}

int64_t resident_blocks(const Request& r, const Team& team) {
  const DeviceInfo& d = r.device;
  const int64_t by_shared = d.shared_bytes_per_sm / (team.shared_bytes + kReservedSharedBytes);
  const int64_t by_threads = d.max_threads_per_sm / kTeamThreads;
  const int64_t registers = 65536 / team.blocks_per_sm;  // what the kernel may use at most
  const int64_t by_registers = d.registers_per_sm / registers;
  return std::min(
      {by_shared, by_threads, by_registers, int64_t{team.blocks_per_sm}, int64_t{kMaxBlocksPerSm}});
}

Scope scope_of(const Request& r, int64_t size) {
  const bool cluster = size <= r.device.max_cluster;
  if (size == 1) return Scope::kBlock;
  if (r.options.scope != Scope::kAuto) {
    const bool possible = r.options.scope == Scope::kCluster ? cluster : r.device.cooperative;
    return r.options.scope != Scope::kBlock && possible ? r.options.scope : Scope::kAuto;
  }
  return cluster ? Scope::kCluster : r.device.cooperative ? Scope::kGrid : Scope::kAuto;
}

// Completes a team of `size` blocks; false where there is none.
bool build(const Request& r, const Traversal& base, int64_t size, Team& team) {
  team = Team{};
  team.pattern = r.pattern;
  Traversal& t = team.traversal;
  t = base;
  const int64_t work = work_of(t, r.pattern);
  team.scope = scope_of(r, size);
  if (team.scope == Scope::kAuto || size > work) return false;
  t.per_split = ceil_div(work, size);
  t.splits = size;
  if ((size - 1) * t.per_split >= work) return false;  // a rank without work
  team.size = static_cast<int>(size);
  lay_out_shared(r, team);
  const int64_t members = r.pattern == Pattern::kAlongS ? t.threads_x : t.threads_y;
  place_windows(r, team, ceil_div(t.per_split, members));
  const int64_t resident = resident_blocks(r, team) * r.device.sm_count;
  team.teams = team.scope == Scope::kBlock ? std::min(t.channel_blocks, r.device.max_grid)
                                           : std::min(t.channel_blocks, resident / size);
  if (resident == 0 || team.teams == 0) return false;
  if (team.scope == Scope::kGrid)
    team.blocks_per_sm = static_cast<int>(resident / r.device.sm_count);
  team.rounds = ceil_div(t.channel_blocks, team.teams);
  team.grid = team.teams * size;
  t.tasks = t.channel_blocks * size;
  t.grid = team.grid;
  t.shared_bytes = team.shared_bytes;
  const int64_t capacity = members * (team.register_windows + team.shared_windows);
  const int64_t streamed = std::max<int64_t>(t.per_split - capacity, 0) * size * t.channel_blocks *
                           (r.pattern == Pattern::kAlongS ? t.threads_y : t.threads_x);
  team.streamed_bytes = streamed * kWindowBytes * r.tensors;
  if (team.scope == Scope::kGrid) {
    team.exchange_bytes = team.grid * 2 * team.slot_values * acc_bytes(r.problem.dtype);
    team.sync_words = 2 + team.grid;
  }
  return true;
}

// Window moves of the busiest SM, with exchanges.
double cost_of(const Request& r, const Team& team) {
  const Traversal& t = team.traversal;
  const int64_t members = r.pattern == Pattern::kAlongS ? t.threads_x : t.threads_y;
  const double held = static_cast<double>(ceil_div(t.per_split, members));
  const double capacity = team.register_windows + team.shared_windows;
  const double moves = held * (r.tensors + 1) + std::max(0.0, held - capacity) * r.tensors;
  const int64_t resident = std::max<int64_t>(resident_blocks(r, team), 1);
  const double waves =
      static_cast<double>(ceil_div(team.grid * team.rounds, resident * r.device.sm_count));
  const double threads = static_cast<double>(resident) * kTeamThreads / 512.0;
  double exchange = 0;
  if (team.scope == Scope::kCluster) exchange = kClusterExchange;
  if (team.scope == Scope::kGrid) {
    // Every block reads every rank's slot, from the L2 cache.
    const double slots = static_cast<double>(team.size) * static_cast<double>(team.slot_values) *
                         acc_bytes(r.problem.dtype) / (512.0 * kWindowBytes);
    exchange = kGridExchange + slots * static_cast<double>(resident);
  }
  return waves * (moves * threads + exchange) + kLaunchCost;
}

// The stage kernels' cost in the same unit: every activation twice but the output once.
double two_pass_cost(const Request& r) {
  const double windows = static_cast<double>(r.problem.n * r.problem.c * r.problem.s) / r.vec /
                         (512.0 * r.device.sm_count);
  return windows * (2 * r.tensors + 1) + 3 * kLaunchCost;
}

bool fits_32_bits(const Request& r, const Traversal& t) {
  const int64_t step = r.pattern == Pattern::kAlongS ? (t.threads_x / t.row_windows + 2) * t.c * t.s
                                                     : int64_t{t.threads_y} * t.row_windows * r.vec;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  return step <= kLimit / 2 && t.numel + t.row_windows * r.vec + r.vec <= kLimit - step;
}

std::string unsuitable(const Request& r, const Traversal& base) {
  if (r.problem.op == Op::kForwardEval) return "eval forward reads its input once anyway";
  if (r.problem.output_shift < 0) return "no elementwise output is wanted";
  if (r.problem.op == Op::kBackwardEval && !r.problem.need_sums) return "no sums are wanted";
  if (r.exact && !fits_32_bits(r, base)) return "the tensor needs 64-bit indices";
  if (r.options.index_bits == 64) return "64-bit indices are forced";
  return "";
}

}  // namespace

Team plan_team(const Problem& problem, const DeviceInfo& device, const PlanOptions& options,
               std::string* reason) {
  const bool forward = problem.op == Op::kForwardTraining || problem.op == Op::kForwardEval;
  const int vec = kWindowBytes / dtype_bytes(problem.dtype);
  const Pattern pattern = choose_pattern(problem, vec);
  const int64_t run = pattern == Pattern::kAlongS ? problem.s : problem.c;
  const bool exact = pattern == Pattern::kAlongRow || (all_aligned(problem) && run % vec == 0);
  const Request r{problem, pattern, device, options, exact, vec, forward ? 1 : 2, forward ? 4 : 2};
  Team best;
  best.size = 0;
  if (pattern == Pattern::kAlongC && !exact) {
    *reason = "channels last with misaligned tensors, or rows that make no whole windows";
    return best;
  }
  const Traversal base = base_traversal(r);
  *reason = unsuitable(r, base);
  if (!reason->empty()) return best;

  const bool forced = options.strategy == Strategy::kTeam;
  double best_cost = forced ? std::numeric_limits<double>::infinity() : two_pass_cost(r);
  *reason = "two passes cost less than any team";
  const int64_t largest = std::min<int64_t>(work_of(base, pattern), int64_t{device.sm_count} * 4);
  for (int64_t size = 1; size <= largest; size += 1 + size / 16) {
    if (options.team_size > 0) size = options.team_size;
    Team team;
    if (base.threads_x < kTeamThreads && pattern == Pattern::kAlongS && size > 1) break;
    if (build(r, base, size, team) && cost_of(r, team) < best_cost) {
      best_cost = cost_of(r, team);
      best = team;
      *reason = team.streamed_bytes > 0 ? "a team holds part of each channel group on chip"
                                        : "a team holds each channel group on chip";
    }
    if (options.team_size > 0) break;
  }
  return best;
}

}  // namespace batchnorm_cuda
