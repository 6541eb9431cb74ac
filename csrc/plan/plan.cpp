#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "plan_bytes.h"
#include "plan_candidates.h"
#include "plan_rows.h"
#include "plan_team.h"

namespace batchnorm_cuda {
namespace {

// Channels of a block that merges partial results: a sector of 4-byte values in each row. The
// fewer, the more rows at once, whose number is what the kernel waits for.
constexpr int64_t kMergeColumns = 8;

int64_t round_up_to_power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

void check_sizes(const Problem& p) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 64;
  const bool negative = p.n < 0 || p.c < 0 || p.s < 0;
  const bool overflows = !negative && p.n > 0 && p.c > 0 && p.s > 0 && p.n > kMax / p.c / p.s;
  if (negative || overflows) {
    throw std::invalid_argument("make_plan: expected n, c and s >= 0 with n*c*s < 2^57, got [" +
                                std::to_string(p.n) + ", " + std::to_string(p.c) + ", " +
                                std::to_string(p.s) + "]");
  }
}

// What a stage kernel is planned for.
struct Stage {
  const DeviceInfo& device;
  const PlanOptions& options;
  int exact_blocks = kStageBlocksPerSm;  // that an SM holds of the kernel without edges

  int64_t places(const Traversal& t) const {
    return int64_t{t.exact ? exact_blocks : kStageBlocksPerSm} * device.sm_count;
  }
};

// Blocks of a stage kernel: one whole wave, each with at least one full batch; one block an SM even
// where a batch is then not full.
int64_t choose_grid(const Traversal& t, int64_t work_per_block, const Stage& stage) {
  const PlanOptions& options = stage.options;
  if (options.splits > 0) return t.channel_blocks * std::min(options.splits, t.work);
  const int64_t units = t.channel_blocks * t.work;
  const int64_t full = std::min(stage.places(t), units / work_per_block);
  const int64_t fill = std::min<int64_t>(stage.device.sm_count, units * kUnroll / work_per_block);
  return std::max(full, fill);
}

// Deals the units of all channel blocks to the blocks, as evenly as whole units allow.
void deal_work(Traversal& t, int64_t work, int64_t work_per_block, const Stage& stage) {
  const DeviceInfo& device = stage.device;
  t.work = work;
  const int64_t units = t.channel_blocks * work;
  constexpr int64_t kProducts = int64_t{1} << 62;  // that the kernels form of grid and blocks
  const int64_t most = std::min({units, device.max_grid, kProducts / t.channel_blocks,
                                 kMaxSplits * std::min(t.channel_blocks, device.max_grid)});
  const int64_t wanted =
      std::max(choose_grid(t, work_per_block, stage), ceil_div(units, kMaxPerSplit));
  t.grid = std::clamp<int64_t>(wanted, 1, most);
  t.tasks = t.grid;
  t.per_split = units / t.grid;
  t.spare = units % t.grid;
  const bool whole = t.grid % t.channel_blocks == 0;  // stretches end where channel blocks do
  t.splits = ceil_div(t.grid, t.channel_blocks) + (whole ? 0 : 1);
}

// Along S. Short channels share a block: threads_x lanes of a warp, up to the whole block, serve
// one.
void plan_along_s(Traversal& t, int vec, const Stage& stage) {
  t.exact = t.exact && t.s % vec == 0;
  t.row_windows = t.exact ? t.s / vec : whole_windows(t.s, vec);
  t.rows = t.n;
  const int64_t windows = t.rows * std::max<int64_t>(t.row_windows, 1);  // or runs, all edges
  const int64_t threads =
      std::max<int64_t>(std::min<int64_t>(windows, kWarpSize), ceil_div(windows, kUnroll));
  t.threads_x = static_cast<int>(
      std::min<int64_t>(kStageThreads, round_up_to_power_of_two(std::min<int64_t>(threads, 1024))));
  t.threads_y = kStageThreads / t.threads_x;
  t.channel_blocks = ceil_div(t.c, t.threads_y);
  deal_work(t, windows, int64_t{t.threads_x} * kUnroll, stage);
}

// The width of even column blocks of at most a warp's, so that the last one is not nearly empty;
// whole sectors wide, so that no two of them touch the same.
int64_t even_columns(int64_t row_windows) {
  const int64_t even = ceil_div(row_windows, ceil_div(row_windows, kWarpSize));
  return std::min(row_windows, ceil_div(even, 2) * 2);
}

// Along C. Where C is no multiple of the window, lcm(C, vec) elements form a row group: windows
// stay aligned, and a window column keeps the same channels in every row group.
void plan_along_c(Traversal& t, int vec, const Stage& stage) {
  const int64_t group = std::lcm(t.c, static_cast<int64_t>(vec));
  t.exact = t.exact && group == t.c;
  t.row_repeat = group / t.c;
  t.row_windows = group / vec;
  t.rows = ceil_div(t.numel + t.shift, group);
  t.threads_x = static_cast<int>(even_columns(t.row_windows));
  t.threads_y = static_cast<int>(
      std::min<int64_t>(kStageThreads / t.threads_x, round_up_to_power_of_two(t.rows)));
  t.channel_blocks = ceil_div(t.row_windows, t.threads_x);
  t.folds = t.row_repeat > 1 && t.channel_blocks == 1;
  deal_work(t, t.rows, int64_t{t.threads_y} * kUnroll, stage);
}

// Along a row, elementwise only: its partial results would be one a column.
void plan_along_row(Traversal& t, const RowLayout& rows, int vec, const Stage& stage) {
  lay_out_rows(rows, vec, kStageThreads, t);
  t.segments = 0;  // no channel need be whole in a block
  deal_work(t, t.rows, int64_t{t.threads_y} * kUnroll, stage);
}

// Rows for the elementwise kernels, wherever a team would walk along them, and wherever a thread
// has enough of them to be worth the parameters of all its lanes. Blocks are as wide as fills them:
// what saves sectors must not cost bytes in flight.
RowLayout elementwise_rows(const Problem& p, int vec) {
  RowLayout rows = choose_rows(p, vec, kStageThreads);
  if (rows.elements == 0) return rows;
  const int64_t threads = kStageThreads / rows.windows * rows.windows;
  if (rows.channels == 0 && threads * 8 >= kStageThreads * 7) return rows;
  const int64_t sample = p.c * p.s;
  rows.elements = std::lcm(sample, int64_t{2} * vec);  // whole sectors, if there are enough
  constexpr int64_t kEnough = 2;
  if (p.n * sample / rows.elements < kEnough) rows.elements = std::lcm(sample, int64_t{vec});
  if (p.n * sample / rows.elements < kEnough) return {};
  rows.windows = even_columns(rows.elements / vec);
  rows.channels = 0;
  return rows;
}

// Index arithmetic reaches at most one step past the last window of a thread.
bool fits_32_bits(const Traversal& t, int vec) {
  if (!t.exact) return false;  // one 64-bit form serves all such sizes and halves what is compiled
  const int64_t step = t.pattern == Pattern::kAlongS ? (t.threads_x / t.row_windows + 2) * t.c * t.s
                                                     : int64_t{t.threads_y} * t.row_windows * vec;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  return step <= kLimit / 2 && t.numel + t.row_windows * vec + vec <= kLimit - step;
}

// `shift` is the reference tensor's, whose 16-byte boundaries define the windows; `exact`: they are
// those of the other tensors that the kernel touches as well.
Traversal lay_out_traversal(const Problem& p, Pattern pattern, int shift, bool exact, int vec,
                            const Stage& stage, const RowLayout& rows) {
  Traversal t;
  t.pattern = pattern;
  t.n = p.n;
  t.c = p.c;
  t.s = p.s;
  t.numel = p.n * p.c * p.s;
  t.shift = shift;
  t.exact = exact;
  if (t.exact && rows.elements > 0) {
    plan_along_row(t, rows, vec, stage);
  } else if (pattern == Pattern::kAlongS) {
    plan_along_s(t, vec, stage);
  } else {
    plan_along_c(t, vec, stage);
  }
  t.index_bits = stage.options.index_bits != 64 && fits_32_bits(t, vec) ? 32 : 64;
  return t;
}

// `others`: shifts of the other tensors, -1 for absent ones.
Traversal plan_traversal(const Problem& p, Pattern pattern, int shift,
                         std::initializer_list<int> others, int vec, const Stage& stage,
                         const RowLayout& rows = {}) {
  const bool exact = shift == 0 && std::max(others) <= 0;
  const auto lay_out = [&](bool exact) {
    return lay_out_traversal(p, pattern, shift, exact, vec, stage, rows);
  };
  const Traversal t = lay_out(exact);
  const bool masked = p.fused || t.pattern != Pattern::kAlongS;  // see with_cursor()
  return t.exact && t.index_bits == 64 && masked ? lay_out(false) : t;
}

MergeGeometry plan_merge(const Traversal& reduce, int fields, int acc_size,
                         const DeviceInfo& device) {
  MergeGeometry m;
  m.rows = reduce.splits * (reduce.folds ? 1 : reduce.row_repeat);
  m.threads_x = static_cast<int>(std::min<int64_t>(reduce.c, kMergeColumns));
  m.threads_y = static_cast<int>(
      std::min<int64_t>(round_up_to_power_of_two(m.rows), kMergeThreads / m.threads_x));
  m.grid = std::min(ceil_div(reduce.c, m.threads_x), device.max_grid);
  m.shared_bytes = column_scratch_values(m.threads_x, m.threads_y, 1, fields) * acc_size;
  return m;
}

void plan_stages(Plan& plan, const Problem& problem, const DeviceInfo& device,
                 const PlanOptions& options) {
  const bool forward = problem.op == Op::kForwardTraining || problem.op == Op::kForwardEval;
  plan.has_reduce = problem.op == Op::kForwardTraining || problem.op == Op::kBackwardTraining ||
                    (problem.op == Op::kBackwardEval && problem.need_sums);
  if (is_double_backward(problem.op)) plan.has_reduce = problem.need_sums;
  plan.has_elementwise = problem.output_shift >= 0;
  if (plan.has_reduce) {
    plan.reduce =
        plan_traversal(problem, plan.pattern, problem.input_shift,
                       {forward ? -1 : problem.grad_output_shift, problem.grad_grad_input_shift},
                       plan.vec, {device, options});
    // Welford, DoubleGradSums and GradSums of reduce.cuh
    const int fields = forward ? 4 : is_double_backward(problem.op) ? 5 : 2;
    const int acc = acc_bytes(problem.dtype);
    const int64_t scratch =
        plan.pattern == Pattern::kAlongC
            ? std::max(column_scratch_values(plan.reduce.threads_x, plan.reduce.threads_y, plan.vec,
                                             fields),
                       int64_t{plan.reduce.threads_x} * plan.vec * fields)
            : int64_t{kStageThreads / kWarpSize} * fields;
    plan.reduce.shared_bytes = scratch * acc;
    plan.merge = plan_merge(plan.reduce, fields, acc, device);
    plan.workspace_bytes = plan.merge.rows * problem.c * fields * acc;
    plan.launches += 2;
  }
  if (plan.has_elementwise) {
    // Behind a reduce stage as many stretches as there, so that what those read last is what these
    // read first.
    const bool alone = !plan.has_reduce && !is_double_backward(problem.op);
    const int exact_blocks = alone ? elementwise_blocks_per_sm(true) : kStageBlocksPerSm;
    plan.elementwise = plan_traversal(problem, plan.pattern, problem.output_shift,
                                      {problem.op == Op::kBackwardEval ? -1 : problem.input_shift,
                                       forward ? problem.residual_shift : problem.grad_output_shift,
                                       problem.grad_grad_input_shift},
                                      plan.vec, {device, options, exact_blocks},
                                      elementwise_rows(problem, plan.vec));
    plan.launches += 1;
  }
}

}  // namespace

Plan make_plan(const Problem& problem, const DeviceInfo& device, const PlanOptions& options) {
  return make_plan(problem, device, options, CostModel{});
}

Plan make_plan(const Problem& given, const DeviceInfo& device, const PlanOptions& options,
               const CostModel& costs) {
  check_sizes(given);
  const Problem problem = in_one_run(given);
  Plan plan;
  plan.pattern = problem.s > 1 ? Pattern::kAlongS : Pattern::kAlongC;
  plan.vec = kWindowBytes / dtype_bytes(problem.dtype);
  if (problem.n == 0 || problem.c == 0 || problem.s == 0) {
    plan.reason = "there is nothing to do";
    return plan;
  }
  plan_stages(plan, problem, device, options);
  plan.cost = two_pass_cost(plan, problem, device, costs);
  if (options.strategy == Strategy::kTwoPass) {
    plan.reason = "two passes are forced";
  } else {
    TeamChoice choice = plan_team(problem, device, options, costs, plan.cost.total());
    plan.team = choice.team;
    plan.reason = std::move(choice.reason);
    if (plan.team.size > 0) plan.cost = choice.cost;
  }
  if (plan.team.size > 0) {
    plan.strategy = Strategy::kTeam;
    plan.launches = 1;
    plan.workspace_bytes = plan.team.exchange_bytes;
  }
  predict_bytes(plan, problem, device);
  return plan;
}

}  // namespace batchnorm_cuda
