// The stage kernels of one dtype with their launchers, and the table of all its kernels.
#pragma once

#include "../kernel_table.h"
#include "backward_elementwise.cuh"
#include "backward_reduce.cuh"
#include "collect_statistics.cuh"
#include "double_backward_elementwise.cuh"
#include "double_backward_reduce.cuh"
#include "normalize.cuh"

namespace batchnorm_cuda {

// The team kernels are compiled elsewhere: they take the compiler longest.
template <typename scalar_t>
KernelTable<scalar_t> table_of_kernels() {
  KernelTable<scalar_t> table{};
  table.statistics = launch_statistics<scalar_t>;
  table.normalize = launch_normalize<scalar_t>;
  table.fused_normalize = launch_normalize<scalar_t>;
  table.backward_reduce = launch_backward_reduce<scalar_t>;
  table.fused_backward_reduce = launch_backward_reduce<scalar_t>;
  table.backward_elementwise = launch_backward_elementwise<scalar_t>;
  table.fused_backward_elementwise = launch_backward_elementwise<scalar_t>;
  table.double_backward_reduce = launch_double_backward_reduce<scalar_t>;
  table.double_backward_elementwise = launch_double_backward_elementwise<scalar_t>;
  table.team_forward = launch_team_forward<scalar_t>;
  table.fused_team_forward = launch_team_forward<scalar_t>;
  table.team_backward = launch_team_backward<scalar_t>;
  table.fused_team_backward = launch_team_backward<scalar_t>;
  return table;
}

}  // namespace batchnorm_cuda
