#include <c10/core/DeviceGuard.h>

#include "../plan/plan_cache.h"
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
  using acc_t = acc_type<scalar_t>;
  const Workspace workspace = allocate_workspace(plan, f.input);
  TeamForwardParams<scalar_t> params{};
  params.team = plan.team;
  params.input = static_cast<const scalar_t*>(f.input.const_data_ptr());
  params.output = static_cast<scalar_t*>(f.output.data_ptr());
  params.weight = param_pointer(f.weight);
  params.bias = param_pointer(f.bias);
  params.statistics = statistics_output<acc_t>(f);
  params.slots = workspace.data<acc_t>();
  params.sync = workspace.words();
  if (!f.problem.fused) return kernels<scalar_t>().team_forward(params, stream);
  return kernels<scalar_t>().fused_team_forward(
      params, fused_params<scalar_t>(f, plan.team.traversal, stream), stream);
}

template <typename scalar_t>
void run_statistics(const Forward& f, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const Workspace workspace = allocate_workspace(plan, f.input);
  MergeStatisticsParams<acc_t> merge{};
  merge.partials = collect_statistics<scalar_t>(f, plan, workspace, stream);
  merge.shift = merge_shift(plan);
  merge.statistics = statistics_output<acc_t>(f);
  check_launch(merges<acc_t>().statistics(plan.merge, merge, stream), "merge_kernel");
}

template <typename scalar_t>
void run(const Forward& f) {
  const c10::Device device = f.input.device();
  const cudaStream_t stream = current_stream(device);
  const Plan* plan = &cached_plan(f.problem, device_info(device), plan_options());
  while (plan->strategy == Strategy::kTeam) {
    const LaunchStatus status = run_team<scalar_t>(f, *plan, stream);
    if (!is_refused(status)) return check_launch(status, "team_kernel");
    plan = &plan_after_refusal(f.problem, device, plan->team, status);
  }
  if (plan->has_reduce) run_statistics<scalar_t>(f, *plan, stream);
  run_normalize<scalar_t>(f, *plan, stream);
}

// The pass over arguments that are checked.
Forward run_checked(const at::Tensor& input, const OptionalTensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                    const Fusion& fusion, bool training, std::optional<double> momentum,
                    double eps) {
  const c10::DeviceGuard guard(input.device());
  Forward f;
  f.input = dense(input);
  f.output = allocate_like(f.input);
  f.save_mean = channel_vector(input);
  f.save_invstd = channel_vector(input);
  if (input.numel() == 0) {
    f.fuse(fusion);
    if (training && num_batches_tracked) num_batches_tracked->add_(1);
    f.save_mean.zero_();
    f.save_invstd.zero_();
    return f;
  }
  const UpdatedInPlace mean(running_mean), var(running_var), counter(num_batches_tracked);
  f.weight = packed(weight);
  f.bias = packed(bias);
  f.running_mean = mean.dense;
  f.running_var = var.dense;
  f.num_batches_tracked = counter.dense;
  f.training = training;
  f.momentum = momentum;
  f.eps = eps;
  f.problem = describe(training ? Op::kForwardTraining : Op::kForwardEval, f.input);
  f.problem.output_shift = shift_of(f.output);
  f.fuse(fusion);
  dispatch_dtype(f.problem.dtype, [&](auto tag) { run<typename decltype(tag)::type>(f); });
  if (training) {
    mean.finish();
    var.finish();
    counter.finish();
  }
  return f;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
    double eps) {
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                momentum, eps);
  const Forward f = run_checked(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                {}, training, momentum, eps);
  return {f.output, f.save_mean, f.save_invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, OptionalTensor> fused_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& residual, bool relu,
    bool need_mask, bool training, std::optional<double> momentum, double eps) {
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                momentum, eps);
  check_residual(residual, input);
  const Forward f = run_checked(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                {residual, relu, need_mask}, training, momentum, eps);
  return {f.output, f.save_mean, f.save_invstd, f.mask};
}

}  // namespace batchnorm_cuda
