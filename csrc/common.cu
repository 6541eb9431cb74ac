// The kernels that are the same for all dtypes of the activations, and their table.
#include "cluster_query.cuh"
#include "kernel_table.h"
#include "merge.cuh"
#include "merge_ranks.cuh"

namespace batchnorm_cuda {

template <typename acc_t>
MergeTable<acc_t> table_of_merges() {
  return {
      launch_merge_statistics<acc_t>, launch_merge_moments<acc_t>,
      launch_merge_gradients<acc_t>,  launch_merge_double_gradients<acc_t>,
      launch_merge_ranks<acc_t>,      launch_sum_ranks<acc_t>,
  };
}

}  // namespace batchnorm_cuda

BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_common() {
  using namespace batchnorm_cuda;
  static const CommonTable table = {table_of_merges<float>(), table_of_merges<double>(),
                                    count_clusters};
  return &table;
}
