// What a launch comes to, and the launchers of the team kernels, which are compiled in files of
// their own. Host code comes to all launchers by way of kernel_table.h.
//
// scalar_t is half, bfloat16, float or double and acc_t float or double; host code names them by
// the tag types of torch/dispatch.h without any CUDA header.
#pragma once

#include "params.h"

// As in the CUDA runtime's headers, which host code here does without.
typedef struct CUstream_st* cudaStream_t;
struct __half;
struct __nv_bfloat16;

namespace batchnorm_cuda {

// 0 is success, anything else the CUDA error code.
using LaunchStatus = int;

// The team kernels may come back refused: nothing was launched, and the work is still to be done.
// kNotResident: by its occupancy this kernel fits the device less often than planned.
constexpr LaunchStatus kNotResident = -1;
// Else it was the launch that failed, by a CUDA error that concerns teams of this scope alone.
constexpr LaunchStatus refused_by(int error) { return -error; }
constexpr bool is_refused(LaunchStatus status) { return status < 0; }

// With `fused`: see fused.cuh.
template <typename scalar_t>
LaunchStatus launch_team_forward(const TeamForwardParams<scalar_t>& params, cudaStream_t stream);
template <typename scalar_t>
LaunchStatus launch_team_forward(const TeamForwardParams<scalar_t>& params,
                                 const FusedForward<scalar_t>& fused, cudaStream_t stream);

template <typename scalar_t>
LaunchStatus launch_team_backward(const TeamBackwardParams<scalar_t>& params, cudaStream_t stream);
template <typename scalar_t>
LaunchStatus launch_team_backward(const TeamBackwardParams<scalar_t>& params,
                                  const FusedBackward<scalar_t>& fused, cudaStream_t stream);

// Zeroes a mask that a kernel of a tiling that is not exact will write.
LaunchStatus clear_mask(uint8_t* mask, int64_t bytes, cudaStream_t stream);

// The text of a LaunchStatus, and the name of its error.
const char* describe_status(LaunchStatus status);
const char* name_of_status(LaunchStatus status);

}  // namespace batchnorm_cuda
