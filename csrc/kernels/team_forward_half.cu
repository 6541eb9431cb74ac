// The team kernels of the forward pass, plain and fused, in half.
#include "team_forward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_forward(const TeamForwardParams<__half>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<__half>&,
                                          const FusedForward<__half>&, cudaStream_t);

}  // namespace batchnorm_cuda
