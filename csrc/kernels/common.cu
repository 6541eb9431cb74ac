// The kernels that are the same for all dtypes of the activations, and their table.
#include "../kernel_table.h"
#include "cluster_query.cuh"
#include "merge.cuh"
#include "merge_ranks.cuh"

namespace batchnorm_cuda {

template <typename acc_t>
MergeTable<acc_t> table_of_merges() {
  MergeTable<acc_t> table{};
  table.statistics = launch_merge<Welford<acc_t>>;
  table.moments = launch_merge<Welford<acc_t>>;
  table.gradients = launch_merge<GradSums<acc_t>>;
  table.double_gradients = launch_merge<DoubleGradSums<acc_t>>;
  table.ranks = launch_merge_ranks;
  table.sum_ranks = launch_sum_ranks;
  return table;
}

}  // namespace batchnorm_cuda

BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_common() {
  using namespace batchnorm_cuda;
  static const CommonTable table = {table_of_merges<float>(), table_of_merges<double>(),
                                    count_clusters};
  return &table;
}
