// The team kernels of the backward pass in bfloat16.
#include "team_backward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_backward(const TeamBackwardParams<__nv_bfloat16>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<__nv_bfloat16>&,
                                           const FusedBackward<__nv_bfloat16>&, cudaStream_t);

}  // namespace batchnorm_cuda
