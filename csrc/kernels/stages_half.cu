// The stage kernels in half, and the table of all kernels in half.
#include "kernel_table.cuh"

BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_half() {
  static const auto table = batchnorm_cuda::table_of_kernels<__half>();
  return &table;
}
