#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <mutex>

#include "checks.h"
#include "device_context.h"
#include "dispatch.h"

namespace batchnorm_cuda {
namespace {

std::mutex options_mutex;
PlanOptions forced_options;

PlanOptions plan_options() {
  const std::lock_guard<std::mutex> lock(options_mutex);
  return forced_options;
}

void check_launch(LaunchStatus status, const char* kernel) {
  TORCH_CHECK(status == 0, "batch_norm: launching ", kernel, " failed: ", describe_status(status));
}

// Any tensor without gaps or overlaps is [N, C, S] in memory with S the channel stride: dimensions
// of smaller stride fill S elements, the others repeat the C*S block. Other strides are copied.
at::Tensor dense(const at::Tensor& tensor) {
  const at::Tensor resolved = tensor.resolve_neg();
  return resolved.is_non_overlapping_and_dense()
             ? resolved
             : resolved.contiguous(resolved.suggest_memory_format());
}

bool same_memory_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

at::Tensor dense_like(const at::Tensor& tensor, const at::Tensor& like) {
  const at::Tensor resolved = tensor.resolve_neg();
  return same_memory_order(resolved, like) ? resolved : at::empty_like(like).copy_(resolved);
}

int shift_of(const at::Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return static_cast<int>(address % kWindowBytes / tensor.element_size());
}

Problem describe(Op op, const at::Tensor& input) {
  Problem problem;
  problem.op = op;
  problem.dtype = to_dtype(input.scalar_type());
  problem.c = input.size(1);
  problem.s = problem.c == 1 ? input.numel() : input.stride(1);
  problem.n = input.numel() / (problem.c * problem.s);
  problem.input_shift = shift_of(input);
  return problem;
}

at::Tensor channel_vector(const at::Tensor& input) {
  const at::ScalarType type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({input.size(1)}, input.options().dtype(type));
}

at::Tensor allocate_workspace(const Plan& plan, const at::Tensor& input) {
  return at::empty({plan.workspace_bytes}, input.options().dtype(at::kByte));
}

ParamPointer param_pointer(const at::Tensor& tensor) {
  return {tensor.data_ptr(), to_dtype(tensor.scalar_type())};
}

ParamPointer param_pointer(const OptionalTensor& tensor) {
  return tensor ? param_pointer(*tensor) : ParamPointer{};
}

// Read-only parameters of any stride: [C] values are cheap to copy.
OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// A running statistic as the kernel updates it; copied back where its own memory has gaps.
struct UpdatedInPlace {
  explicit UpdatedInPlace(const OptionalTensor& tensor) : original(tensor), dense(packed(tensor)) {}
  void finish() const {
    if (dense && !dense->is_same(*original)) original->copy_(*dense);
  }
  const OptionalTensor& original;
  OptionalTensor dense;
};

template <typename scalar_t>
void run_statistics(const Plan& plan, const at::Tensor& input, const at::Tensor& workspace,
                    MergeStatisticsParams<acc_type<scalar_t>> merge, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  StatisticsParams<scalar_t> params{};
  params.traversal = plan.reduce;
  params.input = static_cast<const scalar_t*>(input.const_data_ptr());
  params.partials = {static_cast<acc_t*>(workspace.data_ptr()), plan.merge.rows, plan.reduce.c};
  check_launch(launch_statistics(plan.pattern, params, stream), "collect_statistics_kernel");
  merge.partials = params.partials;
  merge.shift = plan.pattern == Pattern::kAlongC ? plan.reduce.shift : 0;
  check_launch(launch_merge_statistics(plan.merge, merge, stream), "merge_kernel");
}

template <typename scalar_t>
void run_gradient_sums(const Plan& plan, BackwardReduceParams<scalar_t> params,
                       const at::Tensor& workspace, MergeGradientsParams<acc_type<scalar_t>> merge,
                       cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  params.traversal = plan.reduce;
  params.partials = {static_cast<acc_t*>(workspace.data_ptr()), plan.merge.rows, plan.reduce.c};
  check_launch(launch_backward_reduce(plan.pattern, params, stream), "backward_reduce_kernel");
  merge.partials = params.partials;
  merge.shift = plan.pattern == Pattern::kAlongC ? plan.reduce.shift : 0;
  check_launch(launch_merge_gradients(plan.merge, merge, stream), "merge_kernel");
}

}  // namespace

void set_plan_options(const PlanOptions& options) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  forced_options = options;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input_arg, const OptionalTensor& weight_arg, const OptionalTensor& bias_arg,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
    double eps) {
  check_forward(input_arg, weight_arg, bias_arg, running_mean, running_var, num_batches_tracked,
                training, momentum, eps);
  const c10::DeviceGuard guard(input_arg.device());
  const at::Tensor input = dense(input_arg);
  const at::Tensor output = at::empty_like(input);
  const at::Tensor save_mean = channel_vector(input), save_invstd = channel_vector(input);
  if (input.numel() == 0) return {output, save_mean.zero_(), save_invstd.zero_()};

  Problem problem = describe(training ? Op::kForwardTraining : Op::kForwardEval, input);
  problem.output_shift = shift_of(output);
  const Plan plan = make_plan(problem, device_info(input.device()), plan_options());
  const OptionalTensor weight = packed(weight_arg), bias = packed(bias_arg);
  const UpdatedInPlace mean(running_mean), var(running_var);
  const cudaStream_t stream = current_stream(input.device());
  const at::Tensor workspace = allocate_workspace(plan, input);

  dispatch_dtype(problem.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = acc_type<scalar_t>;
    NormalizeParams<scalar_t> params{};
    params.mean = static_cast<acc_t*>(save_mean.data_ptr());
    params.invstd = static_cast<acc_t*>(save_invstd.data_ptr());
    if (training) {
      MergeStatisticsParams<acc_t> merge{};
      merge.count = problem.n * problem.s;
      merge.eps = eps;
      merge.momentum = momentum.value_or(0.0);
      merge.num_batches_tracked = momentum || !num_batches_tracked
                                      ? nullptr
                                      : num_batches_tracked->const_data_ptr<int64_t>();
      merge.save_mean = params.mean;
      merge.save_invstd = params.invstd;
      merge.running_mean = param_pointer(mean.dense);
      merge.running_var = param_pointer(var.dense);
      run_statistics<scalar_t>(plan, input, workspace, merge, stream);
    } else {
      params.running_mean = param_pointer(mean.dense);
      params.running_var = param_pointer(var.dense);
    }
    params.traversal = plan.elementwise;
    params.input_aligned = problem.input_shift == problem.output_shift;
    params.use_running = !training;
    params.eps = eps;
    params.input = static_cast<const scalar_t*>(input.const_data_ptr());
    params.output = static_cast<scalar_t*>(output.data_ptr());
    params.weight = param_pointer(weight);
    params.bias = param_pointer(bias);
    check_launch(launch_normalize(plan.pattern, params, stream), "transform_input_kernel");
  });
  if (training) {
    mean.finish();
    var.finish();
  }
  return {output, save_mean, save_invstd};
}

namespace {

// Everything one backward call works on.
struct Backward {
  at::Tensor grad_output, input, save_mean, save_invstd;
  OptionalTensor weight, grad_input, grad_weight, grad_bias;
  at::Tensor sum_dy, sum_dy_xhat, workspace;
  Problem problem;
  Plan plan;
};

template <typename scalar_t>
void run_backward(const Backward& b, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const auto* const grad_output = static_cast<const scalar_t*>(b.grad_output.const_data_ptr());
  const auto* const input = static_cast<const scalar_t*>(b.input.const_data_ptr());
  const auto* const mean = static_cast<const acc_t*>(b.save_mean.const_data_ptr());
  const auto* const invstd = static_cast<const acc_t*>(b.save_invstd.const_data_ptr());
  acc_t* const sum_dy = b.sum_dy.defined() ? static_cast<acc_t*>(b.sum_dy.data_ptr()) : nullptr;
  acc_t* const sum_dy_xhat =
      b.sum_dy_xhat.defined() ? static_cast<acc_t*>(b.sum_dy_xhat.data_ptr()) : nullptr;
  if (b.plan.has_reduce) {
    BackwardReduceParams<scalar_t> params{};
    params.grad_output_aligned = b.problem.grad_output_shift == b.problem.input_shift;
    params.grad_output = grad_output;
    params.input = input;
    params.mean = mean;
    params.invstd = invstd;
    MergeGradientsParams<acc_t> merge{};
    merge.sum_dy = sum_dy;
    merge.sum_dy_xhat = sum_dy_xhat;
    merge.grad_weight = param_pointer(b.grad_weight);
    merge.grad_bias = param_pointer(b.grad_bias);
    run_gradient_sums(b.plan, params, b.workspace, merge, stream);
  }
  if (b.plan.has_elementwise) {
    const bool training = b.problem.op == Op::kBackwardTraining;
    BackwardElementwiseParams<scalar_t> params{};
    params.traversal = b.plan.elementwise;
    params.grad_output_aligned = b.problem.grad_output_shift == b.problem.output_shift;
    params.input_aligned = b.problem.input_shift == b.problem.output_shift;
    params.count = b.problem.n * b.problem.s;
    params.grad_output = grad_output;
    params.input = training ? input : nullptr;
    params.grad_input = static_cast<scalar_t*>(b.grad_input->data_ptr());
    params.weight = param_pointer(b.weight);
    params.mean = mean;
    params.invstd = invstd;
    params.sum_dy = sum_dy;
    params.sum_dy_xhat = sum_dy_xhat;
    check_launch(launch_backward_elementwise(b.plan.pattern, params, stream),
                 "backward_elementwise_kernel");
  }
}

}  // namespace

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& save_mean, const at::Tensor& save_invstd,
    bool training, bool need_input, bool need_weight, bool need_bias) {
  check_backward(grad_output, input, weight, bias, save_mean, save_invstd, need_weight, need_bias);
  const c10::DeviceGuard guard(input.device());
  Backward b;
  b.input = dense(input);
  if (need_input) b.grad_input = at::empty_like(b.input);
  if (need_weight) b.grad_weight = at::empty({input.size(1)}, weight->options());
  if (need_bias) b.grad_bias = at::empty({input.size(1)}, bias->options());
  if (input.numel() == 0) {
    if (need_weight) b.grad_weight->zero_();
    if (need_bias) b.grad_bias->zero_();
    return {b.grad_input, b.grad_weight, b.grad_bias};
  }
  b.grad_output = dense_like(grad_output, b.input);
  b.weight = packed(weight);
  b.save_mean = save_mean.contiguous();
  b.save_invstd = save_invstd.contiguous();
  b.problem = describe(training ? Op::kBackwardTraining : Op::kBackwardEval, b.input);
  b.problem.grad_output_shift = shift_of(b.grad_output);
  b.problem.output_shift = need_input ? shift_of(*b.grad_input) : -1;
  b.problem.need_sums = need_weight || need_bias;
  b.plan = make_plan(b.problem, device_info(input.device()), plan_options());
  if (training && need_input) {
    b.sum_dy = channel_vector(input);
    b.sum_dy_xhat = channel_vector(input);
  }
  b.workspace = allocate_workspace(b.plan, input);
  dispatch_dtype(b.problem.dtype, [&](auto tag) {
    run_backward<typename decltype(tag)::type>(b, current_stream(input.device()));
  });
  return {b.grad_input, b.grad_weight, b.grad_bias};
}

}  // namespace batchnorm_cuda
