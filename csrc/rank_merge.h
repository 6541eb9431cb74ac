// Geometry of the kernels that merge what the ranks have gathered (merge_ranks.cuh): part of the
// plan, but a matter of the number of channels alone.
#pragma once

#include <algorithm>

#include "plan.h"

namespace batchnorm_cuda {

// A thread serves a column, of which there are hundreds: small blocks reach more SMs.
constexpr int kRankMergeThreads = 64;

struct RankMergeGeometry {
  int64_t grid = 0;
};

inline RankMergeGeometry plan_rank_merge(int64_t columns, const DeviceInfo& device) {
  return {std::min((columns + kRankMergeThreads - 1) / kRankMergeThreads, device.max_grid)};
}

}  // namespace batchnorm_cuda
