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
  if (p.s % (kSectorWindows * vec) == 0 || (p.c * p.s) % vec != 0) return {};
  const int64_t unit = std::lcm(p.s, static_cast<int64_t>(vec)) / vec;
  const int64_t windows = block_windows(unit, p.s % vec == 0, max_windows);
  return {windows > 0 ? p.c * p.s : 0, windows};
}

// A block is a whole row, so that its few rows of C keep every channel's columns together.
RowLayout rows_of_channels(const Problem& p, int vec, int max_windows) {
  if (p.c % (kSectorWindows * vec) == 0) return {};
  for (const int64_t multiple : {kSectorWindows * vec, int64_t{vec}}) {
    const int64_t elements = std::lcm(p.c, multiple);
    const bool whole = (p.n * p.c) % elements == 0 && elements / vec <= max_windows;
    if (whole && elements > p.c) return {elements, elements / vec};
  }
  return {};
}

}  // namespace

RowLayout choose_rows(const Problem& p, int vec, int max_windows) {
  return p.s > 1 ? rows_of_runs(p, vec, max_windows) : rows_of_channels(p, vec, max_windows);
}

void lay_out_rows(const RowLayout& rows, int vec, int threads, Traversal& t) {
  const bool runs = t.s > 1;
  t.pattern = Pattern::kAlongRow;
  t.exact = true;
  t.row_windows = rows.elements / vec;
  t.rows = t.numel / rows.elements;
  t.row_repeat = runs ? 1 : rows.elements / t.c;
  t.threads_x = static_cast<int>(rows.windows);
  t.threads_y = static_cast<int>(threads / rows.windows);
  t.channel_blocks = ceil_div(t.row_windows, t.threads_x);
  t.segment_size = runs ? t.s : t.row_repeat;
  t.segment_step = runs ? t.s : 1;
  t.segment_stride = runs ? 1 : t.c;
  t.segments = runs ? t.threads_x * vec / t.s : t.c;
}

}  // namespace batchnorm_cuda
