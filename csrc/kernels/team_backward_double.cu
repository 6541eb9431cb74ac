// The team kernels of the backward pass in double.
#include "team_backward_launch.cuh"

namespace batchnorm_cuda {

template LaunchStatus launch_team_backward(const TeamBackwardParams<double>&, cudaStream_t);
template LaunchStatus launch_team_backward(const TeamBackwardParams<double>&,
                                           const FusedBackward<double>&, cudaStream_t);

}  // namespace batchnorm_cuda
