// The team kernels of the forward pass without anything fused.
#include "team_forward.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
LaunchStatus launch_team_forward(const TeamForwardParams<scalar_t>& params, cudaStream_t stream) {
  return launch_team_pattern<TeamForward>(params, Identity<acc_type<scalar_t>>{}, stream);
}

template LaunchStatus launch_team_forward(const TeamForwardParams<__half>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<__nv_bfloat16>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<float>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
