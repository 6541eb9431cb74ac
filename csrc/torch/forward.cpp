#include <c10/core/DeviceGuard.h>

#include <utility>

#include "../plan/rank_merge.h"
#include "checks.h"
#include "device_context.h"
#include "dispatch.h"
#include "ops.h"
#include "refusals.h"
#include "stages.h"

namespace batchnorm_cuda {
namespace {

template <typename scalar_t>
LaunchStatus run_team(const Forward& f, const Plan& plan, cudaStream_t stream) {
  const Workspace workspace = allocate_workspace(plan, f.input);
  auto params = team_params<TeamForwardParams<scalar_t>>(f, plan, workspace);
  params.statistics = statistics_output<acc_type<scalar_t>>(f);
  if (!f.problem.fused) return kernels<scalar_t>().team_forward(params, stream);
  return kernels<scalar_t>().fused_team_forward(
      params, fused_params<scalar_t>(f, plan.team.traversal, stream), stream);
}

template <typename scalar_t>
void run_statistics(const Forward& f, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const Workspace workspace = allocate_workspace(plan, f.input);
  auto merge = merge_params<MergeStatisticsParams>(
      plan, collect_statistics<scalar_t>(f, plan, workspace, stream));
  merge.statistics = statistics_output<acc_t>(f);
  check_launch(merges<acc_t>().statistics(plan.merge, merge, stream), "merge_kernel");
}

template <typename scalar_t>
void run(const Forward& f) {
  const c10::Device device = f.input.device();
  const cudaStream_t stream = current_stream(device);
  const Plan* plan = plan_unless_team(
      f.problem, device, [&](const Plan& team) { return run_team<scalar_t>(f, team, stream); });
  if (!plan) return;
  if (plan->has_reduce) run_statistics<scalar_t>(f, *plan, stream);
  run_normalize<scalar_t>(f, *plan, stream);
}

template <typename scalar_t>
void run_merge_ranks(const Forward& f, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  MergeRanksParams<acc_t> params{};
  params.ranks = static_cast<int>(f.gathered->size(0));
  params.gathered = static_cast<acc_t*>(f.gathered->data_ptr());
  params.count = static_cast<int64_t*>(f.count->data_ptr());
  params.statistics = statistics_output<acc_t>(f);
  const RankMergeGeometry geometry = plan_rank_merge(f.problem.c, device_info(f.input.device()));
  check_launch(merges<acc_t>().ranks(geometry, params, stream), "merge_ranks_kernel");
}

template <typename scalar_t>
void run_of_ranks(const Forward& f) {
  const cudaStream_t stream = current_stream(f.input.device());
  const Plan& plan = plan_parts(f.problem, f.input);
  run_merge_ranks<scalar_t>(f, plan, stream);
  if (f.input.numel() > 0) run_normalize<scalar_t>(f, plan, stream);
}

void allocate_mask(Forward& f) {
  const int64_t bytes = mask_bytes_of(f.input);
  f.mask = allocate({whole_words(bytes)}, f.input.options().dtype(at::kByte));
  if (f.mask->numel() != bytes) f.mask = f.mask->narrow(0, 0, bytes);
}

// The record as kernels take it, and its results, uninitialised.
Forward prepare(ForwardCall&& call) {
  Forward f{std::move(call)};
  f.input = dense(std::move(f.input));
  f.output = allocate_like(f.input);
  const at::TensorOptions options = statistics_options(f.input);
  f.mean = allocate({f.input.size(1)}, options);
  f.invstd = allocate({f.input.size(1)}, options);
  if (f.gathered) {
    f.gathered = f.gathered->contiguous();
    f.count = allocate({1}, f.input.options().dtype(at::kLong));
  }
  f.weight = packed(std::move(f.weight));
  f.bias = packed(std::move(f.bias));
  f.problem = describe(f.training ? Op::kForwardTraining : Op::kForwardEval, f.input);
  f.problem.output_shift = shift_of(f.output);
  if (f.relu && f.need_mask) allocate_mask(f);
  if (f.input.numel() == 0) f.residual.reset();
  if (f.residual) {
    f.residual = dense_like(std::move(*f.residual), f.input);
    f.problem.residual_shift = shift_of(*f.residual);
  }
  f.problem.fused = f.relu || f.residual;
  f.problem.mask = f.mask.has_value();
  return f;
}

// Without a channel, or a value that anybody could normalise by.
void fill_empty(const Forward& f) {
  if (f.training && f.num_batches_tracked) f.num_batches_tracked->add_(1);
  f.mean.zero_();
  f.invstd.zero_();
  if (f.count) f.count->zero_();
}

}  // namespace

Normalized forward(ForwardCall call) {
  check(call);
  const c10::DeviceGuard guard(call.input.device());
  Forward f = prepare(std::move(call));
  if (f.problem.c == 0 || (f.input.numel() == 0 && !f.gathered)) {
    fill_empty(f);
    return std::move(f);
  }
  const UpdatedInPlace mean(f.running_mean), var(f.running_var), counter(f.num_batches_tracked);
  dispatch_dtype(f.problem.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    f.gathered ? run_of_ranks<scalar_t>(f) : run<scalar_t>(f);
  });
  if (f.training) {
    mean.finish();
    var.finish();
    counter.finish();
  }
  return std::move(f);
}

}  // namespace batchnorm_cuda
