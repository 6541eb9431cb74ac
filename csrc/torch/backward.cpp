#include <c10/core/DeviceGuard.h>

#include <utility>

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
  const Workspace workspace = allocate_workspace(plan, b.input);
  auto params = team_params<TeamBackwardParams<scalar_t>>(b, plan, workspace);
  params.training = b.statistics();
  params.input = pointer_to<scalar_t>(b.input);
  params.grad_weight = param_pointer(b.grad_weight);
  params.grad_bias = param_pointer(b.grad_bias);
  if (!b.problem.fused) return kernels<scalar_t>().team_backward(params, stream);
  return kernels<scalar_t>().fused_team_backward(params, fused_params<scalar_t>(b), stream);
}

template <typename scalar_t>
void run(Backward& b) {
  const c10::Device device = b.input.device();
  const cudaStream_t stream = current_stream(device);
  const Plan* plan = plan_unless_team(
      b.problem, device, [&](const Plan& team) { return run_team<scalar_t>(b, team, stream); });
  if (!plan) return;
  if (b.statistics() && b.grad_input) b.sums = sums_of(b.input);
  if (plan->has_reduce) run_reduce<scalar_t>(b, *plan, stream);
  if (plan->has_elementwise) run_elementwise<scalar_t>(b, *plan, stream);
}

// The elementwise part alone: the sums are there.
template <typename scalar_t>
void run_with_sums(const Backward& b) {
  run_elementwise<scalar_t>(b, plan_parts(b.problem, b.input), current_stream(b.input.device()));
}

// What is read, as kernels take it. Beside a mask on the boundaries that fused.cuh asks for.
Backward prepare(BackwardCall&& call, Op op) {
  Backward b{std::move(call)};
  b.mask = packed(std::move(b.mask));
  b.input = dense(std::move(b.input));
  b.grad_output = dense_like(std::move(b.grad_output), b.input);
  if (b.mask) {
    b.input = on_boundary(std::move(b.input));
    b.grad_output = on_boundary(std::move(b.grad_output));
  }
  b.weight = packed(std::move(b.weight));
  b.save_mean = dense(std::move(b.save_mean));
  b.save_invstd = dense(std::move(b.save_invstd));
  b.sums = packed(std::move(b.sums));
  b.problem = describe(op, b.input);
  b.problem.grad_output_shift = shift_of(b.grad_output);
  b.problem.fused = b.problem.mask = b.mask.has_value();
  b.problem.outputs = 0;
  return b;
}

void allocate_like_input(Backward& b, bool needed, OptionalTensor& result) {
  if (!needed) return;
  result = allocate_like(b.input);
  const int shift = shift_of(*result);
  TORCH_INTERNAL_ASSERT(b.problem.outputs == 0 || shift == b.problem.output_shift,
                        "the allocator aligned two tensors of one size differently");
  TORCH_INTERNAL_ASSERT(shift == 0 || !b.mask, "an output is on no 16-byte boundary");
  b.problem.output_shift = shift;
  b.problem.outputs += 1;
}

void allocate_of_parameters(Backward& b) {
  const int64_t c = b.input.size(1);
  if (b.need_weight) b.grad_weight = allocate({c}, b.weight->options());
  if (b.need_bias) b.grad_bias = allocate({c}, b.bias->options());
  if (b.input.numel() > 0) return;
  if (b.need_weight) b.grad_weight->zero_();
  if (b.need_bias) b.grad_bias->zero_();
}

// What the statistics depend on is nothing to the other gradients: a ReLU's alone are as in eval.
Op op_of(const BackwardCall& call) {
  const bool statistics = call.training && (call.need_input || !call.mask);
  return statistics ? Op::kBackwardTraining : Op::kBackwardEval;
}

}  // namespace

Gradients backward(BackwardCall call) {
  check(call);
  const c10::DeviceGuard guard(call.input.device());
  const bool have_sums = call.sums.has_value();
  const Op op = op_of(call);
  Backward b = prepare(std::move(call), op);
  allocate_like_input(b, b.need_input, b.grad_input);
  allocate_like_input(b, b.need_residual, b.grad_residual);
  allocate_of_parameters(b);
  b.problem.need_sums = b.need_weight || b.need_bias;
  if (b.input.numel() == 0 || (have_sums && b.problem.outputs == 0)) return std::move(b);
  dispatch_dtype(b.problem.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    have_sums ? run_with_sums<scalar_t>(b) : run<scalar_t>(b);
  });
  return std::move(b);
}

OwnGradients reduce_gradients(BackwardCall call) {
  check(call);
  const c10::DeviceGuard guard(call.input.device());
  Backward b = prepare(std::move(call), Op::kBackwardTraining);
  allocate_of_parameters(b);
  b.sums = sums_of(b.input);
  if (b.input.numel() == 0) {
    b.sums->zero_();
  } else {
    dispatch_dtype(b.problem.dtype, [&](auto tag) {
      run_reduce<typename decltype(tag)::type>(b, plan_parts(b.problem, b.input),
                                               current_stream(b.input.device()));
    });
  }
  return {*b.sums, b.grad_weight, b.grad_bias};
}

}  // namespace batchnorm_cuda
