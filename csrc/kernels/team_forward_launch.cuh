// The launchers of the forward pass's team kernels, plain and fused (fused.cuh). Each is
// instantiated in a file of its own for each dtype, because they take the compiler longest.
#pragma once

#include "team_forward.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
LaunchStatus launch_team_forward(const TeamForwardParams<scalar_t>& params, cudaStream_t stream) {
  return launch_team_pattern<TeamForward>(params, Identity<acc_type<scalar_t>>{}, stream);
}

template <typename scalar_t>
LaunchStatus launch_team_forward(const TeamForwardParams<scalar_t>& params,
                                 const FusedForward<scalar_t>& fused, cudaStream_t stream) {
  return launch_team_pattern<TeamForward>(params, fused, stream);
}

}  // namespace batchnorm_cuda
