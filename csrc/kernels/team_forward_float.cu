// The team kernels of the forward pass, plain and fused, in float.
#include "team_forward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_forward(const TeamForwardParams<float>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<float>&,
                                          const FusedForward<float>&, cudaStream_t);

}  // namespace batchnorm_cuda
