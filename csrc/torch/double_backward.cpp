#include <c10/core/DeviceGuard.h>

#include <utility>

#include "../plan/plan_cache.h"
#include "checks.h"
#include "device_context.h"
#include "dispatch.h"
#include "ops.h"
#include "stages.h"

namespace batchnorm_cuda {
namespace {

// A call at work.
struct DoubleBackward : DoubleBackwardCall, DoubleGradients {
  Problem problem;
};

template <typename scalar_t>
const scalar_t* read_if(bool takes_part, const OptionalTensor& tensor) {
  return takes_part && tensor ? static_cast<const scalar_t*>(tensor->const_data_ptr()) : nullptr;
}

template <typename scalar_t>
scalar_t* written(const OptionalTensor& tensor) {
  return tensor ? static_cast<scalar_t*>(tensor->data_ptr()) : nullptr;
}

// Are any sums over the channel wanted? In eval mode only grad_weight is one; in training mode the
// gradient of grad_input sends sums into all results, and dy sends its own into grad_input.
bool needs_sums(const DoubleBackward& b) {
  if (!b.training) return b.grad_weight && b.grad_grad_input;
  return b.grad_grad_input || b.grad_input;
}

// Returns the sums of every channel, 5 planes of [C], undefined where no elementwise kernel follows
// that would use them.
template <typename scalar_t>
at::Tensor run_reduce(const DoubleBackward& b, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const Workspace workspace = allocate_workspace(plan, b.input);
  DoubleBackwardReduceParams<scalar_t> params{};
  params.traversal = plan.reduce;
  params.grad_output_aligned = b.problem.grad_output_shift == b.problem.input_shift;
  params.grad_grad_input_aligned = b.problem.grad_grad_input_shift == b.problem.input_shift;
  params.grad_output = read_if<scalar_t>(b.grad_input || b.grad_weight, b.grad_output);
  params.grad_grad_input = read_if<scalar_t>(true, b.grad_grad_input);
  params.input = read_if<scalar_t>(b.training, b.input);
  params.mean = pointer_to<acc_t>(b.save_mean);
  params.invstd = pointer_to<acc_t>(b.save_invstd);
  params.partials = {workspace.data<acc_t>(), plan.merge.rows, plan.reduce.c};
  check_launch(kernels<scalar_t>().double_backward_reduce(plan.pattern, params, stream),
               "double_backward_reduce_kernel");

  at::Tensor sums;
  auto merge = merge_params<MergeDoubleGradientsParams>(plan, params.partials);
  merge.training = b.training;
  merge.count = b.problem.n * b.problem.s;
  merge.invstd = params.invstd;
  if (b.training && plan.has_elementwise) {
    sums = allocate({5, plan.reduce.c}, b.save_mean.options());
    merge.sums = {static_cast<acc_t*>(sums.data_ptr()), 1, plan.reduce.c};
  }
  merge.grad_weight = param_pointer(b.grad_weight);
  check_launch(merges<acc_t>().double_gradients(plan.merge, merge, stream), "merge_kernel");
  return sums;
}

template <typename scalar_t>
void run_elementwise(const DoubleBackward& b, const Plan& plan, const at::Tensor& sums,
                     cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const Problem& problem = b.problem;
  const bool training = b.training;
  DoubleBackwardElementwiseParams<scalar_t> params{};
  params.traversal = plan.elementwise;
  params.grad_output_aligned = problem.grad_output_shift == problem.output_shift;
  params.grad_grad_input_aligned = problem.grad_grad_input_shift == problem.output_shift;
  params.input_aligned = problem.input_shift == problem.output_shift;
  params.training = training;
  params.count = problem.n * problem.s;
  params.grad_output = read_if<scalar_t>(b.grad_input.has_value(), b.grad_output);
  params.grad_grad_input = read_if<scalar_t>(training || b.grad_grad_output, b.grad_grad_input);
  params.input = read_if<scalar_t>(training || (b.grad_grad_output && b.grad_grad_weight), b.input);
  params.grad_grad_output = written<scalar_t>(b.grad_grad_output);
  params.grad_input = written<scalar_t>(b.grad_input);
  params.weight = param_pointer(b.weight);
  params.grad_grad_weight = param_pointer(b.grad_grad_weight);
  params.grad_grad_bias = param_pointer(b.grad_grad_bias);
  params.mean = pointer_to<acc_t>(b.save_mean);
  params.invstd = pointer_to<acc_t>(b.save_invstd);
  if (sums.defined()) params.sums = {static_cast<acc_t*>(sums.data_ptr()), 1, problem.c};
  check_launch(
      kernels<scalar_t>().double_backward_elementwise(plan.elementwise.pattern, params, stream),
      "double_backward_elementwise_kernel");
}

template <typename scalar_t>
void run(const DoubleBackward& b) {
  const Plan& plan = cached_plan(b.problem, device_info(b.input.device()), plan_options());
  const cudaStream_t stream = current_stream(b.input.device());
  at::Tensor sums;
  if (plan.has_reduce) sums = run_reduce<scalar_t>(b, plan, stream);
  if (plan.has_elementwise) run_elementwise<scalar_t>(b, plan, sums, stream);
}

void describe_tensors(DoubleBackward& b) {
  b.problem = describe(b.training ? Op::kDoubleBackwardTraining : Op::kDoubleBackwardEval, b.input);
  if (b.grad_output) b.problem.grad_output_shift = shift_of(*b.grad_output);
  if (b.grad_grad_input) b.problem.grad_grad_input_shift = shift_of(*b.grad_grad_input);
  b.problem.outputs = 0;
  for (const OptionalTensor* output : {&b.grad_grad_output, &b.grad_input}) {
    if (!*output) continue;
    const int shift = shift_of(**output);
    TORCH_INTERNAL_ASSERT(b.problem.outputs == 0 || shift == b.problem.output_shift,
                          "the allocator aligned two tensors of one size differently");
    b.problem.output_shift = shift;
    b.problem.outputs += 1;
  }
  b.problem.need_sums = needs_sums(b);
}

// Without a gradient of grad_input no kernel writes grad_weight: it is then zero.
void allocate_results(DoubleBackward& b) {
  if (b.need_grad_output) b.grad_grad_output = allocate_like(b.input);
  if (b.need_input) b.grad_input = allocate_like(b.input);
  if (!b.need_weight) return;
  const bool zero = !b.grad_grad_input || b.input.numel() == 0;
  b.grad_weight = zero ? allocate_zeros({b.input.size(1)}, b.weight->options())
                       : allocate({b.input.size(1)}, b.weight->options());
}

}  // namespace

DoubleGradients double_backward(DoubleBackwardCall call) {
  check(call);
  const c10::DeviceGuard guard(call.input.device());
  DoubleBackward b{std::move(call)};
  b.input = dense(std::move(b.input));
  allocate_results(b);
  const bool wanted = b.need_grad_output || b.need_input || b.need_weight;
  if (b.input.numel() == 0 || !wanted) return std::move(b);
  if (b.grad_output) b.grad_output = dense_like(std::move(*b.grad_output), b.input);
  if (b.grad_grad_input) b.grad_grad_input = dense_like(std::move(*b.grad_grad_input), b.input);
  for (OptionalTensor* vector : {&b.weight, &b.grad_grad_weight, &b.grad_grad_bias}) {
    *vector = packed(std::move(*vector));
  }
  b.save_mean = dense(std::move(b.save_mean));
  b.save_invstd = dense(std::move(b.save_invstd));
  describe_tensors(b);
  dispatch_dtype(b.problem.dtype, [&](auto tag) { run<typename decltype(tag)::type>(b); });
  return std::move(b);
}

}  // namespace batchnorm_cuda
