// The team kernels of the backward pass, fused (fused.cuh).
#include "team_backward.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
LaunchStatus launch_team_backward(const TeamBackwardParams<scalar_t>& params,
                                  const FusedBackward<scalar_t>& fused, cudaStream_t stream) {
  return launch_team_pattern<TeamBackward>(params, fused, stream);
}

template LaunchStatus launch_team_backward(const TeamBackwardParams<__half>&,
                                           const FusedBackward<__half>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<__nv_bfloat16>&,
                                           const FusedBackward<__nv_bfloat16>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<float>&,
                                           const FusedBackward<float>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<double>&,
                                           const FusedBackward<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
