// The team kernels of the forward pass, plain and fused, in bfloat16.
#include "team_forward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_forward(const TeamForwardParams<__nv_bfloat16>&, cudaStream_t);
template LaunchStatus launch_team_forward(const TeamForwardParams<__nv_bfloat16>&,
                                          const FusedForward<__nv_bfloat16>&, cudaStream_t);

}  // namespace batchnorm_cuda
