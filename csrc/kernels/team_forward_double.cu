// The team kernels of the forward pass, plain and fused, in double.
#include "team_forward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_forward(const TeamForwardParams<double>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<double>&,
                                          const FusedForward<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
