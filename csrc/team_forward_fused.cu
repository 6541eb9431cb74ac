// The team kernels of the forward pass, fused (fused.cuh).
#include "team_forward.cuh"

namespace batchnorm_cuda {

template <typename scalar_t>
LaunchStatus launch_team_forward(const TeamForwardParams<scalar_t>& params,
                                 const FusedForward<scalar_t>& fused, cudaStream_t stream) {
  return launch_team_pattern<TeamForward>(params, fused, stream);
}

template LaunchStatus launch_team_forward(const TeamForwardParams<__half>&,
                                          const FusedForward<__half>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<__nv_bfloat16>&,
                                          const FusedForward<__nv_bfloat16>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<float>&,
                                          const FusedForward<float>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<double>&,
                                          const FusedForward<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
