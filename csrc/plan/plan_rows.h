// Walks along rows (Pattern::kAlongRow): where runs or rows of channels are no whole sectors, whole
// rows of all channels are, or several of them together; and where those are too long for a block,
// several channels at a time waste less than one. Shared by stage and team kernels.
#pragma once

#include "plan.h"

namespace batchnorm_cuda {

// The samples of a single channel are one run, of whole windows but for its ends.
inline Problem in_one_run(Problem p) {
  if (p.c == 1) {
    p.s *= p.n;
    p.n = 1;
  }
  return p;
}

struct RowLayout {
  int64_t elements = 0;  // of a row, which repeats; 0: the tensor does not suit
  int64_t windows = 0;   // of a channel block: whole channels, whole windows
  int64_t channels = 0;  // masked: of a channel block, in one sample; else 0
};

// Rows are walked where that saves sectors: where runs along S, or rows along C, are no multiple of
// 32 bytes, and short enough for a block to be whole channels wide.
RowLayout choose_rows(const Problem& problem, int vec, int max_windows);

// Everything of `t` but its splits, for blocks of `threads` threads at most.
void lay_out_rows(const RowLayout& rows, int vec, int threads, Traversal& t);

}  // namespace batchnorm_cuda
