// The launchers of the backward pass's team kernels, plain and fused (fused.cuh). Each dtype is
// instantiated in a file of its own, because these kernels take the compiler longest.
#pragma once

#include "team_backward.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
LaunchStatus launch_team_backward(const TeamBackwardParams<scalar_t>& params, cudaStream_t stream) {
  return launch_team_pattern<TeamBackward>(params, Identity<acc_type<scalar_t>>{}, stream);
}

template <typename scalar_t>
LaunchStatus launch_team_backward(const TeamBackwardParams<scalar_t>& params,
                                  const FusedBackward<scalar_t>& fused, cudaStream_t stream) {
  return launch_team_pattern<TeamBackward>(params, fused, stream);
}

}  // namespace batchnorm_cuda
