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
LaunchStatus run_team(const Backward& b, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const Workspace workspace = allocate_workspace(plan, b.input);
  TeamBackwardParams<scalar_t> params{};
  params.team = plan.team;
  params.training = b.training();
  params.count = b.problem.n * b.problem.s;
  params.grad_output = pointer_to<scalar_t>(b.grad_output);
  params.input = pointer_to<scalar_t>(b.input);
  if (b.grad_input) params.grad_input = static_cast<scalar_t*>(b.grad_input->data_ptr());
  params.weight = param_pointer(b.weight);
  params.mean = pointer_to<acc_t>(b.save_mean);
  params.invstd = pointer_to<acc_t>(b.save_invstd);
  params.grad_weight = param_pointer(b.grad_weight);
  params.grad_bias = param_pointer(b.grad_bias);
  params.slots = workspace.data<acc_t>();
  params.sync = workspace.words();
  if (!b.problem.fused) return kernels<scalar_t>().team_backward(params, stream);
  return kernels<scalar_t>().fused_team_backward(params, fused_params<scalar_t>(b), stream);
}

template <typename scalar_t>
void run(const Backward& b) {
  const c10::Device device = b.input.device();
  const cudaStream_t stream = current_stream(device);
  const Plan* plan = &cached_plan(b.problem, device_info(device), plan_options());
  while (plan->strategy == Strategy::kTeam) {
    const LaunchStatus status = run_team<scalar_t>(b, *plan, stream);
    if (!is_refused(status)) return check_launch(status, "team_kernel");
    plan = &plan_after_refusal(b.problem, device, plan->team, status);
  }
  Sums sums;
  if (b.training() && b.grad_input) sums = {channel_vector(b.input), channel_vector(b.input)};
  if (plan->has_reduce) run_reduce<scalar_t>(b, *plan, sums, stream);
  if (plan->has_elementwise) run_elementwise<scalar_t>(b, *plan, sums, stream);
}

// What a caller wants of the pass.
struct Wanted {
  bool input, weight, bias, residual = false;
};

// The pass over arguments that are checked.
Backward run_checked(const at::Tensor& grad_output, const at::Tensor& input,
                     const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& save_mean, const at::Tensor& save_invstd,
                     const OptionalTensor& mask, bool training, const Wanted& need) {
  const c10::DeviceGuard guard(input.device());
  Backward b;
  b.read(grad_output, input, mask);
  if (need.input) b.grad_input = allocate_like(b.input);
  if (need.residual) b.grad_residual = allocate_like(b.input);
  if (need.weight) b.grad_weight = allocate({input.size(1)}, weight->options());
  if (need.bias) b.grad_bias = allocate({input.size(1)}, bias->options());
  if (input.numel() == 0) {
    if (need.weight) b.grad_weight->zero_();
    if (need.bias) b.grad_bias->zero_();
    return b;
  }
  b.weight = packed(weight);
  b.save_mean = save_mean.contiguous();
  b.save_invstd = save_invstd.contiguous();
  // What the statistics depend on is nothing to the other gradients: a ReLU's alone are as in eval.
  const bool statistics = training && (need.input || !mask);
  b.problem = describe(statistics ? Op::kBackwardTraining : Op::kBackwardEval, b.input);
  b.problem.grad_output_shift = shift_of(b.grad_output);
  b.problem.need_sums = need.weight || need.bias;
  b.describe_outputs();
  dispatch_dtype(b.problem.dtype, [&](auto tag) { run<typename decltype(tag)::type>(b); });
  return b;
}

}  // namespace

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& save_mean, const at::Tensor& save_invstd,
    bool training, bool need_input, bool need_weight, bool need_bias) {
  check_backward(grad_output, input, weight, bias, save_mean, save_invstd, need_weight, need_bias);
  const Backward b = run_checked(grad_output, input, weight, bias, save_mean, save_invstd,
                                 std::nullopt, training, {need_input, need_weight, need_bias});
  return {b.grad_input, b.grad_weight, b.grad_bias};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> fused_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& save_mean, const at::Tensor& save_invstd,
    const at::Tensor& mask, bool training, bool need_input, bool need_weight, bool need_bias,
    bool need_residual) {
  check_backward(grad_output, input, weight, bias, save_mean, save_invstd, need_weight, need_bias);
  check_mask(mask, input);
  const Backward b = run_checked(grad_output, input, weight, bias, save_mean, save_invstd, mask,
                                 training, {need_input, need_weight, need_bias, need_residual});
  return {b.grad_input, b.grad_weight, b.grad_bias, b.grad_residual};
}

}  // namespace batchnorm_cuda
