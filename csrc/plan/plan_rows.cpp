#include "plan_rows.h"

#include <algorithm>
#include <numeric>

namespace batchnorm_cuda {
namespace {

constexpr int64_t kSectorWindows = 2;
// Least width of a block, 128 bytes: narrower ones share too many cache lines.
constexpr int64_t kLeastWindows = 8;

// The width of a block in windows for runs of whole units: the one of whose sectors and threads
// the most are of use. The boundary between two blocks of an odd number of windows is inside a
// sector, which both touch; runs of whole windows need not put up with that.
int64_t block_windows(int64_t unit, bool even_only, int64_t max_windows) {
  int64_t best = 0;
  double best_use = 0;
  for (int64_t windows = unit; windows <= max_windows; windows += unit) {
    const bool even = windows % kSectorWindows == 0;
    if (windows < kLeastWindows || (even_only && !even)) continue;
    const auto width = static_cast<double>(windows);
    const double threads = width * static_cast<double>(max_windows / windows);
    const double sectors = even ? 1.0 : width / (width + 1);
    const double use = threads / static_cast<double>(max_windows) * sectors;
    if (use > best_use + 1e-9) {
      best = windows;
      best_use = use;
    }
    if (windows >= 4 * kLeastWindows && best > 0) break;  // narrow blocks give more teams
  }
  return best;
}

RowLayout rows_of_runs(const Problem& p, int vec, int max_windows) {
  const int64_t unit = std::lcm(p.s, static_cast<int64_t>(vec)) / vec;
  const int64_t windows = block_windows(unit, p.s % vec == 0, max_windows);
  return {windows > 0 ? p.c * p.s : 0, windows};
}

// Samples of C*S elements that are no whole sectors: a few of them together are, or at least whole
// windows. A block is the whole row, so that every channel's columns are together.
RowLayout rows_of_samples(const Problem& p, int vec, int max_windows) {
  const int64_t sample = p.c * p.s;
  for (const int64_t multiple : {kSectorWindows * vec, int64_t{vec}}) {
    const int64_t elements = std::lcm(sample, multiple);
    const bool whole = p.n * sample % elements == 0 && elements / vec <= max_windows;
    if (whole && elements > sample) return {elements, elements / vec};
  }
  return {};
}

// Samples that start at different places in a window: as many channels as fit a block beside all
// those places. One channel alone is a run, which the walk along S takes as well.
RowLayout masked_rows(const Problem& p, int vec, int max_windows, int64_t least) {
  const int64_t sample = p.c * p.s;
  const int64_t elements = std::lcm(sample, static_cast<int64_t>(vec));
  const int64_t starts = elements / sample;
  if (p.n < starts) return {};
  const int64_t most = std::min(p.c, (max_windows / starts * vec - (vec - 1)) / p.s);
  if (most < least) return {};
  const int64_t channels = ceil_div(p.c, ceil_div(p.c, most));
  return {elements, ceil_div(channels * p.s + vec - 1, vec), channels};
}

}  // namespace

RowLayout choose_rows(const Problem& p, int vec, int max_windows) {
  const int64_t sector = kSectorWindows * vec, run = p.s > 1 ? p.s : p.c;
  if (run % sector == 0) return {};
  const bool whole_samples = p.c * p.s % vec == 0;
  const RowLayout rows = p.s > 1 && whole_samples ? rows_of_runs(p, vec, max_windows)
                                                  : rows_of_samples(p, vec, max_windows);
  if (p.s == 1 || p.s % vec == 0 || rows.elements > 0) return rows;
  // Where samples are whole windows, only the ends of runs cost sectors: of long ones, few.
  return masked_rows(p, vec, max_windows, whole_samples ? 4 : 2);
}

void lay_out_rows(const RowLayout& rows, int vec, int threads, Traversal& t) {
  t.pattern = Pattern::kAlongRow;
  t.exact = rows.channels == 0 && t.numel % rows.elements == 0;
  t.row_windows = rows.elements / vec;
  t.rows = ceil_div(t.numel, rows.elements);
  t.row_repeat = rows.elements / (t.c * t.s);
  t.threads_x = static_cast<int>(rows.windows);
  if (rows.channels > 0) {
    const int64_t samples = threads / rows.windows / t.row_repeat * t.row_repeat;
    t.threads_y = static_cast<int>(samples);
    t.channel_blocks = ceil_div(t.c, rows.channels);
    t.segments = rows.channels;
    return;
  }
  t.threads_y = static_cast<int>(threads / rows.windows);
  t.channel_blocks = ceil_div(t.row_windows, t.threads_x);
  t.segments = t.threads_x * vec / (t.s * t.row_repeat);
}

}  // namespace batchnorm_cuda
