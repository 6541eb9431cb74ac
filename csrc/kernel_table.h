// The seam between host code and kernels: tables of launchers, one for each dtype of the
// activations and one for what all share. A launcher enqueues one kernel on the stream and returns
// the launch's error. Each may be a shared object of its own, which is compiled and loaded when a
// tensor of its dtype first comes; where all is linked into one module (the host model, a user's
// own build), the tables are found there.
#pragma once

#include <functional>
#include <string>

#include "launch.h"
#include "rank_params.h"

// The one function that a shared object of kernels exports; it returns the address of its table.
#define BATCHNORM_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace batchnorm_cuda {

// stages_<dtype>.cu. What is fused: see fused.cuh.
template <typename scalar_t>
struct KernelTable {
  template <typename Params, typename... Fused>
  using Stage = LaunchStatus (*)(Pattern, const Params&, const Fused&..., cudaStream_t);
  template <typename Params, typename... Fused>
  using Team = LaunchStatus (*)(const Params&, const Fused&..., cudaStream_t);

  Stage<StatisticsParams<scalar_t>> statistics;
  Stage<NormalizeParams<scalar_t>> normalize;
  Stage<NormalizeParams<scalar_t>, FusedForward<scalar_t>> fused_normalize;
  Stage<BackwardReduceParams<scalar_t>> backward_reduce;
  Stage<BackwardReduceParams<scalar_t>, FusedBackward<scalar_t>> fused_backward_reduce;
  Stage<BackwardElementwiseParams<scalar_t>> backward_elementwise;
  Stage<BackwardElementwiseParams<scalar_t>, FusedBackward<scalar_t>> fused_backward_elementwise;
  Stage<DoubleBackwardReduceParams<scalar_t>> double_backward_reduce;
  Stage<DoubleBackwardElementwiseParams<scalar_t>> double_backward_elementwise;
  Team<TeamForwardParams<scalar_t>> team_forward;
  Team<TeamForwardParams<scalar_t>, FusedForward<scalar_t>> fused_team_forward;
  Team<TeamBackwardParams<scalar_t>> team_backward;
  Team<TeamBackwardParams<scalar_t>, FusedBackward<scalar_t>> fused_team_backward;
};

// Over partial results and what ranks have gathered, in float or double.
template <typename acc_t>
struct MergeTable {
  template <typename Geometry, template <typename> class Params>
  using Merge = LaunchStatus (*)(const Geometry&, const Params<acc_t>&, cudaStream_t);

  Merge<MergeGeometry, MergeStatisticsParams> statistics;
  // Writes what the other ranks need to know of the batch, instead of its final statistics.
  Merge<MergeGeometry, MergeMomentsParams> moments;
  Merge<MergeGeometry, MergeGradientsParams> gradients;
  Merge<MergeGeometry, MergeDoubleGradientsParams> double_gradients;
  // Merge what all ranks have gathered, to the same bits whatever the order of the ranks.
  Merge<RankMergeGeometry, MergeRanksParams> ranks;
  Merge<RankMergeGeometry, SumRanksParams> sum_ranks;
};

// common.cu
struct CommonTable {
  MergeTable<float> in_float;
  MergeTable<double> in_double;
  LaunchStatus (*count_clusters)(int size, int shared_bytes, int* clusters);
};

// The tables; what is not there yet is loaded, which may take as long as a compilation. Throw
// std::runtime_error, or what the loader throws.
template <typename scalar_t>
const KernelTable<scalar_t>& kernels();
template <typename acc_t>
const MergeTable<acc_t>& merges();
const CommonTable& common_kernels();

// Tells the path of the shared object of a table ("half", "common"), once it is there.
using KernelLoader = std::function<std::string(const std::string& table)>;
void set_kernel_loader(KernelLoader loader);

}  // namespace batchnorm_cuda
