// The stage kernels in bfloat16, and the table of all kernels in bfloat16.
#include "kernel_table.cuh"

BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_bfloat16() {
  static const auto table = batchnorm_cuda::table_of_kernels<__nv_bfloat16>();
  return &table;
}
