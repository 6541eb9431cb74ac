// The seam between host code and kernels: one function per stage. Each enqueues one kernel on the
// stream and returns the launch's error. Definitions are in the .cuh file of the stage; host code
// comes to them by way of kernel_table.h.
//
// scalar_t is half, bfloat16, float or double and acc_t float or double; host code names them by
// the tag types of dispatch.h without any CUDA header.
#pragma once

#include "params.h"
#include "rank_merge.h"

// As in the CUDA runtime's headers, which host code here does without.
typedef struct CUstream_st* cudaStream_t;
struct __half;
struct __nv_bfloat16;

namespace batchnorm_cuda {

// 0 is success, anything else the CUDA error code.
using LaunchStatus = int;

template <typename scalar_t>
LaunchStatus launch_statistics(Pattern pattern, const StatisticsParams<scalar_t>& params,
                               cudaStream_t stream);

template <typename acc_t>
LaunchStatus launch_merge_statistics(const MergeGeometry& geometry,
                                     const MergeStatisticsParams<acc_t>& params,
                                     cudaStream_t stream);

// Writes what the other ranks need to know of the batch, instead of its final statistics.
template <typename acc_t>
LaunchStatus launch_merge_moments(const MergeGeometry& geometry,
                                  const MergeMomentsParams<acc_t>& params, cudaStream_t stream);

// Merge what all ranks have gathered, to the same bits whatever the order of the ranks.
template <typename acc_t>
LaunchStatus launch_merge_ranks(const RankMergeGeometry& geometry,
                                const MergeRanksParams<acc_t>& params, cudaStream_t stream);
template <typename acc_t>
LaunchStatus launch_sum_ranks(const RankMergeGeometry& geometry,
                              const SumRanksParams<acc_t>& params, cudaStream_t stream);

// With `fused`, here and below: see fused.cuh.
template <typename scalar_t>
LaunchStatus launch_normalize(Pattern pattern, const NormalizeParams<scalar_t>& params,
                              cudaStream_t stream);
template <typename scalar_t>
LaunchStatus launch_normalize(Pattern pattern, const NormalizeParams<scalar_t>& params,
                              const FusedForward<scalar_t>& fused, cudaStream_t stream);

// Zeroes a mask that a kernel of a tiling that is not exact will write.
LaunchStatus clear_mask(uint8_t* mask, int64_t bytes, cudaStream_t stream);

template <typename scalar_t>
LaunchStatus launch_backward_reduce(Pattern pattern, const BackwardReduceParams<scalar_t>& params,
                                    cudaStream_t stream);
template <typename scalar_t>
LaunchStatus launch_backward_reduce(Pattern pattern, const BackwardReduceParams<scalar_t>& params,
                                    const FusedBackward<scalar_t>& fused, cudaStream_t stream);

template <typename acc_t>
LaunchStatus launch_merge_gradients(const MergeGeometry& geometry,
                                    const MergeGradientsParams<acc_t>& params, cudaStream_t stream);

template <typename scalar_t>
LaunchStatus launch_backward_elementwise(Pattern pattern,
                                         const BackwardElementwiseParams<scalar_t>& params,
                                         cudaStream_t stream);
template <typename scalar_t>
LaunchStatus launch_backward_elementwise(Pattern pattern,
                                         const BackwardElementwiseParams<scalar_t>& params,
                                         const FusedBackward<scalar_t>& fused, cudaStream_t stream);

template <typename scalar_t>
LaunchStatus launch_double_backward_reduce(Pattern pattern,
                                           const DoubleBackwardReduceParams<scalar_t>& params,
                                           cudaStream_t stream);
template <typename acc_t>
LaunchStatus launch_merge_double_gradients(const MergeGeometry& geometry,
                                           const MergeDoubleGradientsParams<acc_t>& params,
                                           cudaStream_t stream);
template <typename scalar_t>
LaunchStatus launch_double_backward_elementwise(
    Pattern pattern, const DoubleBackwardElementwiseParams<scalar_t>& params, cudaStream_t stream);

// The team kernels may come back refused: nothing was launched, and the work is still to be done.
// kNotResident: by its occupancy this kernel fits the device less often than planned.
constexpr LaunchStatus kNotResident = -1;
// Else it was the launch that failed, by a CUDA error that concerns teams of this scope alone.
constexpr LaunchStatus refused_by(int error) { return -error; }
constexpr bool is_refused(LaunchStatus status) { return status < 0; }

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

// The text of a LaunchStatus, and the name of its error.
const char* describe_status(LaunchStatus status);
const char* name_of_status(LaunchStatus status);

}  // namespace batchnorm_cuda
