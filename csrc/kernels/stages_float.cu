// The stage kernels in float, and the table of all kernels in float.
#include "kernel_table.cuh"

BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_float() {
  static const auto table = batchnorm_cuda::table_of_kernels<float>();
  return &table;
}
