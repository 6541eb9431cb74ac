// The team kernels of the forward pass in bfloat16.
#include "team_forward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_forward(const TeamForwardParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace batchnorm_cuda
