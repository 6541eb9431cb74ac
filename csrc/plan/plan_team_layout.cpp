// The layout of a team: how its threads walk over the tensor, and what they hold where.
#include <algorithm>
#include <cmath>

#include "plan_team.h"

namespace batchnorm_cuda {
namespace {

constexpr int64_t kSectorWindows = 2, kLineWindows = 8;
constexpr int64_t kReservedSharedBytes = 1024;  // per block, by the system
constexpr int kMaxBlocksPerSm = 32;
constexpr int kFormulaFields = 4;       // of a channel, at most (formulas.cuh)
constexpr int kRegistersPerSm = 65536;  // that the launch bounds of the kernels are made for

int64_t power_of_two_at_least(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

void lay_out_along_s(const TeamRequest& r, Traversal& t) {
  t.row_windows = r.exact ? t.s / r.vec : whole_windows(t.s, r.vec);
  t.rows = t.n;
  const int64_t windows = t.rows * t.row_windows;
  const int64_t held = kUnroll / r.tensors;  // before a thread more is worth its while
  const int64_t threads = std::max(std::min<int64_t>(windows, kWarpSize), ceil_div(windows, held));
  t.threads_x = static_cast<int>(std::min<int64_t>(kTeamThreads, power_of_two_at_least(threads)));
  t.threads_y = kTeamThreads / t.threads_x;
  t.channel_blocks = ceil_div(t.c, t.threads_y);
}

// Slabs of even width, so that the last one is not nearly empty; a power of two, so that warps are
// whole rows and merge by shuffles, where that leaves no more than an eighth of the columns idle.
void lay_out_along_c(const TeamRequest& r, int slab, Traversal& t) {
  t.row_windows = t.c / r.vec;
  t.rows = t.n;
  const int64_t even = ceil_div(t.row_windows, ceil_div(t.row_windows, slab));
  const int64_t power = power_of_two_at_least(even);
  const bool full = ceil_div(t.row_windows, power) * power * 7 <= t.row_windows * 8;
  t.threads_x = static_cast<int>(full ? power : even);
  t.threads_y = kTeamThreads / t.threads_x;
  t.channel_blocks = ceil_div(t.row_windows, t.threads_x);
}

// The shared memory of a block: scratch of its reduction, slots of a cluster's exchange, windows.
void lay_out_shared(const TeamRequest& r, Team& team) {
  const Traversal& t = team.traversal;
  const int acc = acc_bytes(r.problem.dtype);
  const bool along_s = r.pattern == Pattern::kAlongS;
  const int64_t columns = int64_t{t.threads_x} * r.channels;
  const int kept = r.exact ? 1 : static_cast<int>(t.row_repeat);  // rows along a row
  int64_t scratch =
      along_s ? int64_t{kTeamThreads / kWarpSize} * r.fields
              : column_scratch_values(t.threads_x, t.threads_y, r.channels, r.fields, kept);
  const bool along_row = r.pattern == Pattern::kAlongRow;
  const int64_t channels = along_s ? t.threads_y : along_row ? t.segments : columns;
  team.slot_values = channels * r.fields;
  if (!along_s) {  // results of all columns, then of the channels, in whose place come formulas
    const int64_t apart = along_row ? columns * kept * r.fields : 0;
    scratch = std::max(scratch, apart + channels * std::max(r.fields, kFormulaFields));
  }
  team.scratch_bytes = round_up(scratch * acc, kWindowBytes);
  const int64_t slots = team.scope == Scope::kCluster ? 2 * team.slot_values * acc : 0;
  team.data_offset = team.scratch_bytes + round_up(slots, kWindowBytes);
}

// Windows per thread that the block's part needs, and where they go: registers first, then shared
// memory as far as it leaves as many blocks resident as the registers do. What fits neither is read
// twice. False where the block has no room for what it works with beside.
bool place_windows(const TeamRequest& r, Team& team, int64_t per_thread) {
  team.tensors = r.tensors;
  team.register_windows =
      team_windows(r.pattern, r.exact, dtype_bytes(r.problem.dtype), r.tensors, r.problem.fused) /
      r.tensors;
  team.blocks_per_sm = kTeamBlocksPerSm;
  const int64_t block_bytes =
      std::min(r.device.shared_bytes_per_sm / team.blocks_per_sm - kReservedSharedBytes,
               r.device.shared_bytes_per_block_optin);
  const int64_t room = block_bytes - team.data_offset;
  if (room < 0) return false;
  const int64_t slot_bytes = int64_t{kTeamThreads} * kWindowBytes * r.tensors;
  const int64_t wanted = std::max<int64_t>(per_thread - team.register_windows, 0);
  const int64_t shared = std::min<int64_t>(room / slot_bytes, wanted);
  team.shared_windows = static_cast<int>(shared);
  team.shared_bytes = team.data_offset + shared * slot_bytes;
  return true;
}

int64_t resident_blocks(const TeamRequest& r, const Team& team) {
  const DeviceInfo& d = r.device;
  const int64_t by_shared = d.shared_bytes_per_sm / (team.shared_bytes + kReservedSharedBytes);
  const int64_t by_threads = d.max_threads_per_sm / kTeamThreads;
  const int64_t by_registers = d.registers_per_sm / (kRegistersPerSm / team.blocks_per_sm);
  return std::min(
      {by_shared, by_threads, by_registers, int64_t{team.blocks_per_sm}, int64_t{kMaxBlocksPerSm}});
}

// Teams that are resident at once. As many clusters as fit with one block on an SM fit again for
// each further block of the SM, which is what is sure.
int64_t resident_teams(const TeamRequest& r, const Team& team) {
  const DeviceInfo& d = r.device;
  const int64_t by_places = int64_t{team.blocks_per_sm} * d.sm_count / team.size;
  if (team.scope != Scope::kCluster) return by_places;
  const int clusters = team.size > 4   ? d.clusters_of_8
                       : team.size > 2 ? d.clusters_of_4
                                       : d.clusters_of_2;
  return clusters == 0 ? by_places : std::min(by_places, int64_t{team.blocks_per_sm} * clusters);
}

void plan_workspace(const TeamRequest& r, Team& team) {
  if (team.scope != Scope::kGrid) return;
  const int acc = acc_bytes(r.problem.dtype);
  team.two_level = r.channels > 1 && team.size * team.slot_values * acc > kTwoLevelBytes;
  const int64_t totals = team.two_level ? team.teams : 0;
  team.exchange_bytes = (team.grid + totals) * 2 * team.slot_values * acc;
  team.sync_words = 2 + team.grid;
}

// The part of each of `size` blocks. Along S a part ends where a cache line may, if it is long
// enough for that to matter little, or where a sector may: else two blocks would touch it.
int64_t part_of(int64_t work, int64_t size, Pattern pattern) {
  const int64_t even = ceil_div(work, size);
  if (pattern != Pattern::kAlongS) return even;
  for (const int64_t unit : {kLineWindows, kSectorWindows}) {
    const int64_t part = round_up(even, unit);
    if (part * 64 <= even * 65 && (size - 1) * part < work) return part;
  }
  return even;
}

// Of all tensors, what exceeds the room of the blocks that hold it.
int64_t streamed_bytes(const TeamRequest& r, const Team& team, int64_t members, int64_t work) {
  const Traversal& t = team.traversal;
  const int64_t capacity = members * (team.register_windows + team.shared_windows);
  const int64_t last = work - (team.size - 1) * t.per_split;
  const int64_t streamed = (team.size - 1) * std::max<int64_t>(t.per_split - capacity, 0) +
                           std::max<int64_t>(last - capacity, 0);
  const double share = static_cast<double>(streamed) / static_cast<double>(work);
  const int64_t bytes = t.numel * dtype_bytes(r.problem.dtype) * r.tensors;
  return static_cast<int64_t>(std::ceil(share * static_cast<double>(bytes)));
}

}  // namespace

Traversal team_traversal(const TeamRequest& r, int slab) {
  const Problem& p = r.problem;
  Traversal t;
  t.n = p.n;
  t.c = p.c;
  t.s = p.s;
  t.numel = p.n * p.c * p.s;
  t.pattern = r.pattern;
  t.shift = p.output_shift;
  t.exact = r.exact;
  t.index_bits = 32;
  if (r.pattern == Pattern::kAlongS) lay_out_along_s(r, t);
  if (r.pattern == Pattern::kAlongC) lay_out_along_c(r, slab, t);
  if (r.pattern == Pattern::kAlongRow) lay_out_rows(r.rows, r.vec, kTeamThreads, t);
  return t;
}

int64_t team_work(const Traversal& t, Pattern pattern) {
  return pattern == Pattern::kAlongS ? t.rows * t.row_windows : t.rows;
}

int team_members(const Traversal& t, Pattern pattern) {
  if (pattern == Pattern::kAlongS) return t.threads_x;
  const bool samples_apart = pattern == Pattern::kAlongRow && !t.exact;
  return samples_apart ? t.threads_y / static_cast<int>(t.row_repeat) : t.threads_y;
}

int64_t ranks_with_work(const TeamRequest& r, const Traversal& base, int64_t size) {
  const int64_t work = team_work(base, r.pattern);
  return ceil_div(work, part_of(work, size, r.pattern));
}

bool build_team(const TeamRequest& r, const Traversal& base, Scope scope, int64_t size,
                Team& team) {
  team = Team{};
  team.pattern = r.pattern;
  Traversal& t = team.traversal;
  t = base;
  const int64_t work = team_work(t, r.pattern);
  team.scope = scope;
  if (size > work) return false;
  t.work = work;
  t.per_split = part_of(work, size, r.pattern);
  t.splits = size;
  if ((size - 1) * t.per_split >= work) return false;  // a rank without work
  team.size = static_cast<int>(size);
  lay_out_shared(r, team);
  const int64_t members = team_members(t, r.pattern);
  if (!place_windows(r, team, ceil_div(t.per_split, members))) return false;
  team.blocks_per_sm = static_cast<int>(resident_blocks(r, team));
  if (team.blocks_per_sm == 0) return false;
  const bool alone = team.scope == Scope::kBlock;  // leaves, and the next one comes
  team.teams = std::min(
      {t.channel_blocks, r.device.max_grid, alone ? t.channel_blocks : resident_teams(r, team)});
  if (team.teams == 0) return false;
  team.rounds = ceil_div(t.channel_blocks, team.teams);
  team.grid = team.teams * size;
  t.tasks = t.channel_blocks * size;
  t.grid = team.grid;
  t.shared_bytes = team.shared_bytes;
  team.streamed_bytes = streamed_bytes(r, team, members, work);
  plan_workspace(r, team);
  return true;
}

}  // namespace batchnorm_cuda
