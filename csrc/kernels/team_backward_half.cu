// The team kernels of the backward pass in half.
#include "team_backward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_backward(const TeamBackwardParams<__half>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<__half>&,
                                           const FusedBackward<__half>&, cudaStream_t);

}  // namespace batchnorm_cuda
