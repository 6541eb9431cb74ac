// The plan of the kernels that merge what the ranks have gathered: a matter of the number of
// channels alone.
#pragma once

#include <algorithm>

#include "plan.h"

namespace batchnorm_cuda {

inline RankMergeGeometry plan_rank_merge(int64_t columns, const DeviceInfo& device) {
  return {std::min((columns + kRankMergeThreads - 1) / kRankMergeThreads, device.max_grid)};
}

}  // namespace batchnorm_cuda
