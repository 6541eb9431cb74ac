// The stage kernels in double, and the table of all kernels in double.
#include "kernel_table.cuh"

BATCHNORM_CUDA_EXPORT const void* batchnorm_cuda_kernels_double() {
  static const auto table = batchnorm_cuda::table_of_kernels<double>();
  return &table;
}
