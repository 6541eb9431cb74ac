// The team kernels of the backward pass in float.
#include "team_backward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_backward(const TeamBackwardParams<float>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<float>&,
                                           const FusedBackward<float>&, cudaStream_t);

}  // namespace batchnorm_cuda
