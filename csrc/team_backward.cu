// The team kernels of the backward pass without anything fused.
#include "team_backward.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
LaunchStatus launch_team_backward(const TeamBackwardParams<scalar_t>& params, cudaStream_t stream) {
  return launch_team_pattern<TeamBackward>(params, Identity<acc_type<scalar_t>>{}, stream);
}

template LaunchStatus launch_team_backward(const TeamBackwardParams<__half>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<__nv_bfloat16>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<float>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
