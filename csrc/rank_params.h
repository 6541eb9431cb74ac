// Arguments of the kernels by which the ranks of a process group share a batch: as params.h.
#pragma once

#include "params.h"

namespace batchnorm_cuda {

// What a rank tells the others of its batch, packed so that one collective carries it: the values
// per channel as one 64-bit integer, then mean [C] and M2 [C]. The count is data: the host of
// another rank never sees it.
template <typename acc_t>
struct MomentsRow {
  acc_t* data;
  int64_t c;
  static constexpr int kCountValues = sizeof(int64_t) / sizeof(acc_t);
  BATCHNORM_CUDA_HOST_DEVICE int64_t values() const { return kCountValues + 2 * c; }
  BATCHNORM_CUDA_HOST_DEVICE int64_t* count() const { return reinterpret_cast<int64_t*>(data); }
  BATCHNORM_CUDA_HOST_DEVICE acc_t* mean() const { return data + kCountValues; }
  BATCHNORM_CUDA_HOST_DEVICE acc_t* m2() const { return mean() + c; }
};

template <typename acc_t>
struct MergeMomentsParams {
  Partials<acc_t> partials;  // 4 planes
  int shift;                 // as in MergeStatisticsParams
  int64_t count;             // values per channel
  MomentsRow<acc_t> moments;
  template <typename F>
  void visit_buffers(F&& f) const {
    f("partials", partials.data, partials.bytes(4), true, false);
    f("moments", moments.data, sizeof(acc_t) * moments.values(), false, true);
  }
};

template <typename acc_t>
struct MergeRanksParams {
  int ranks;
  acc_t* gathered;                     // [ranks, row of moments]
  int64_t* count;                      // [1]: values per channel of all ranks
  StatisticsOutput<acc_t> statistics;  // its count is not used: it is on the device
  BATCHNORM_CUDA_HOST_DEVICE MomentsRow<acc_t> row(int rank) const {
    const MomentsRow<acc_t> first{gathered, statistics.c};
    return {gathered + rank * first.values(), statistics.c};
  }
  template <typename F>
  void visit_buffers(F&& f) const {
    f("gathered", gathered, sizeof(acc_t) * ranks * row(0).values(), true, false);
    f("count", count, sizeof(int64_t), false, true);
    statistics.visit_buffers(f);
  }
};

template <typename acc_t>
struct SumRanksParams {
  int ranks;
  int64_t columns;
  const acc_t* gathered;  // [ranks, columns]
  acc_t* sums;            // [columns]
  template <typename F>
  void visit_buffers(F&& f) const {
    f("gathered", gathered, sizeof(acc_t) * ranks * columns, true, false);
    f("sums", sums, sizeof(acc_t) * columns, false, true);
  }
};

}  // namespace batchnorm_cuda
