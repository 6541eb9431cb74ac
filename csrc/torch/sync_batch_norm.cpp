#include <c10/core/DeviceGuard.h>

#include "../plan/plan_cache.h"
#include "../plan/rank_merge.h"
#include "checks.h"
#include "device_context.h"
#include "dispatch.h"
#include "ops.h"
#include "stages.h"

namespace batchnorm_cuda {
namespace {

// The stages alone: a team kernel cannot stop for the other ranks.
const Plan& plan_parts(const Problem& problem, const at::Tensor& input) {
  PlanOptions options = plan_options();
  options.strategy = Strategy::kTwoPass;
  return cached_plan(problem, device_info(input.device()), options);
}

template <typename scalar_t>
void run_moments(const Forward& f, const at::Tensor& row) {
  using acc_t = acc_type<scalar_t>;
  const cudaStream_t stream = current_stream(f.input.device());
  const Plan& plan = plan_parts(f.problem, f.input);
  const Workspace workspace = allocate_workspace(plan, f.input);
  MergeMomentsParams<acc_t> merge{};
  merge.partials = collect_statistics<scalar_t>(f, plan, workspace, stream);
  merge.shift = merge_shift(plan);
  merge.count = f.problem.n * f.problem.s;
  merge.moments = {static_cast<acc_t*>(row.data_ptr()), f.problem.c};
  check_launch(merges<acc_t>().moments(plan.merge, merge, stream), "merge_kernel");
}

template <typename scalar_t>
void run_merge_ranks(const Forward& f, const at::Tensor& gathered, const at::Tensor& count) {
  using acc_t = acc_type<scalar_t>;
  MergeRanksParams<acc_t> params{};
  params.ranks = static_cast<int>(gathered.size(0));
  params.gathered = static_cast<acc_t*>(gathered.data_ptr());
  params.count = static_cast<int64_t*>(count.data_ptr());
  params.statistics = statistics_output<acc_t>(f);
  const RankMergeGeometry geometry = plan_rank_merge(f.problem.c, device_info(f.input.device()));
  check_launch(merges<acc_t>().ranks(geometry, params, current_stream(f.input.device())),
               "merge_ranks_kernel");
}

template <typename acc_t>
void run_sum_ranks(const at::Tensor& gathered, const at::Tensor& sums) {
  SumRanksParams<acc_t> params{};
  params.ranks = static_cast<int>(gathered.size(0));
  params.columns = sums.numel();
  params.gathered = pointer_to<acc_t>(gathered);
  params.sums = static_cast<acc_t*>(sums.data_ptr());
  const RankMergeGeometry geometry = plan_rank_merge(sums.numel(), device_info(sums.device()));
  check_launch(merges<acc_t>().sum_ranks(geometry, params, current_stream(sums.device())),
               "sum_ranks_kernel");
}

// A rank without values takes part in the merge, where only the channels count.
Problem describe_part(Op op, const at::Tensor& input) {
  if (input.numel() > 0) return describe(op, input);
  Problem problem;
  problem.op = op;
  problem.dtype = to_dtype(input.scalar_type());
  problem.c = input.size(1);
  return problem;
}

Backward backward_part(const at::Tensor& grad_output, const at::Tensor& input,
                       const at::Tensor& mean, const at::Tensor& invstd,
                       const OptionalTensor& mask) {
  Backward b;
  b.read(grad_output, input, mask);
  b.save_mean = mean.contiguous();
  b.save_invstd = invstd.contiguous();
  b.problem = describe_part(Op::kBackwardTraining, b.input);
  b.problem.grad_output_shift = shift_of(b.grad_output);
  b.describe_outputs();
  return b;
}

// What a forward pass in parts returns.
struct SyncForward {
  Forward pass;
  at::Tensor count;
};

// The passes over arguments that are checked.
SyncForward merge_and_normalize(const at::Tensor& input, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                const at::Tensor& gathered, const Fusion& fusion,
                                std::optional<double> momentum, double eps) {
  const c10::DeviceGuard guard(input.device());
  const UpdatedInPlace mean(running_mean), var(running_var), counter(num_batches_tracked);
  Forward f{};
  f.input = dense(input);
  f.output = allocate_like(f.input);
  f.save_mean = channel_vector(input);
  f.save_invstd = channel_vector(input);
  f.weight = packed(weight);
  f.bias = packed(bias);
  f.running_mean = mean.dense;
  f.running_var = var.dense;
  f.num_batches_tracked = counter.dense;
  f.training = true;
  f.momentum = momentum;
  f.eps = eps;
  f.problem = describe_part(Op::kForwardTraining, f.input);
  f.fuse(fusion);
  const at::Tensor count = allocate({1}, input.options().dtype(at::kLong));
  if (f.problem.c == 0) {
    if (num_batches_tracked) num_batches_tracked->add_(1);
    return {f, count.zero_()};
  }
  const at::Tensor rows = gathered.contiguous();
  dispatch_dtype(f.problem.dtype, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    run_merge_ranks<scalar_t>(f, rows, count);
    if (input.numel() == 0) return;
    f.problem.output_shift = shift_of(f.output);
    run_normalize<scalar_t>(f, plan_parts(f.problem, f.input), current_stream(f.input.device()));
  });
  mean.finish();
  var.finish();
  counter.finish();
  return {f, count};
}

std::tuple<at::Tensor, OptionalTensor, OptionalTensor> reduce_gradients(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
    const OptionalTensor& mask, bool need_weight, bool need_bias) {
  const c10::DeviceGuard guard(input.device());
  const at::Tensor sums = allocate({2, input.size(1)}, statistics_options(input));
  OptionalTensor grad_weight, grad_bias;
  if (need_weight) grad_weight = allocate({input.size(1)}, weight->options());
  if (need_bias) grad_bias = allocate({input.size(1)}, bias->options());
  if (input.numel() == 0) {
    if (need_weight) grad_weight->zero_();
    if (need_bias) grad_bias->zero_();
    return {sums.zero_(), grad_weight, grad_bias};
  }
  Backward b = backward_part(grad_output, input, mean, invstd, mask);
  b.grad_weight = grad_weight;
  b.grad_bias = grad_bias;
  dispatch_dtype(b.problem.dtype, [&](auto tag) {
    run_reduce<typename decltype(tag)::type>(b, plan_parts(b.problem, b.input),
                                             {sums.select(0, 0), sums.select(0, 1)},
                                             current_stream(b.input.device()));
  });
  return {sums, grad_weight, grad_bias};
}

Backward form_gradients(const at::Tensor& grad_output, const at::Tensor& input,
                        const OptionalTensor& weight, const at::Tensor& mean,
                        const at::Tensor& invstd, const at::Tensor& sums, const at::Tensor& count,
                        const OptionalTensor& mask, bool need_input, bool need_residual) {
  const c10::DeviceGuard guard(input.device());
  Backward b = backward_part(grad_output, input, mean, invstd, mask);
  if (need_input) b.grad_input = allocate_like(b.input);
  if (need_residual) b.grad_residual = allocate_like(b.input);
  if (input.numel() == 0 || !(need_input || need_residual)) return b;
  b.weight = packed(weight);
  b.total_count = count;
  b.describe_outputs();
  if (!need_input) {  // the sums take no part in the residual's gradient, nor does x
    b.problem.op = Op::kBackwardEval;
    b.problem.need_sums = false;
  }
  const at::Tensor totals = sums.contiguous();
  dispatch_dtype(b.problem.dtype, [&](auto tag) {
    run_elementwise<typename decltype(tag)::type>(b, plan_parts(b.problem, b.input),
                                                  {totals.select(0, 0), totals.select(0, 1)},
                                                  current_stream(b.input.device()));
  });
  return b;
}

}  // namespace

at::Tensor sync_statistics(const at::Tensor& input) {
  check_sync_statistics(input);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor row = allocate({moments_values(input)}, statistics_options(input));
  if (input.numel() == 0) return row.zero_();
  Forward f{};
  f.input = dense(input);
  f.problem = describe(Op::kForwardTraining, f.input);
  dispatch_dtype(f.problem.dtype,
                 [&](auto tag) { run_moments<typename decltype(tag)::type>(f, row); });
  return row;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sync_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const at::Tensor& gathered,
    std::optional<double> momentum, double eps) {
  check_sync_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, gathered,
                     momentum, eps);
  const auto [f, count] = merge_and_normalize(input, weight, bias, running_mean, running_var,
                                              num_batches_tracked, gathered, {}, momentum, eps);
  return {f.output, f.save_mean, f.save_invstd, count};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, OptionalTensor> sync_fused_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const at::Tensor& gathered,
    const OptionalTensor& residual, bool relu, bool need_mask, std::optional<double> momentum,
    double eps) {
  check_sync_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, gathered,
                     momentum, eps);
  check_residual(residual, input);
  const auto [f, count] =
      merge_and_normalize(input, weight, bias, running_mean, running_var, num_batches_tracked,
                          gathered, {residual, relu, need_mask}, momentum, eps);
  return {f.output, f.save_mean, f.save_invstd, count, f.mask};
}

std::tuple<at::Tensor, OptionalTensor, OptionalTensor> sync_backward_reduce(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool need_weight,
    bool need_bias) {
  check_backward(grad_output, input, weight, bias, mean, invstd, need_weight, need_bias);
  return reduce_gradients(grad_output, input, weight, bias, mean, invstd, std::nullopt, need_weight,
                          need_bias);
}

std::tuple<at::Tensor, OptionalTensor, OptionalTensor> sync_fused_backward_reduce(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
    const at::Tensor& mask, bool need_weight, bool need_bias) {
  check_backward(grad_output, input, weight, bias, mean, invstd, need_weight, need_bias);
  check_mask(mask, input);
  return reduce_gradients(grad_output, input, weight, bias, mean, invstd, mask, need_weight,
                          need_bias);
}

at::Tensor sync_sum(const at::Tensor& gathered) {
  check_sum_ranks(gathered);
  const c10::DeviceGuard guard(gathered.device());
  const at::Tensor rows = gathered.contiguous();
  const at::Tensor sums = allocate(gathered.sizes().slice(1), gathered.options());
  if (sums.numel() == 0) return sums;
  if (gathered.scalar_type() == at::kDouble) {
    run_sum_ranks<double>(rows, sums);
  } else {
    run_sum_ranks<float>(rows, sums);
  }
  return sums;
}

at::Tensor sync_backward_elementwise(const at::Tensor& grad_output, const at::Tensor& input,
                                     const OptionalTensor& weight, const at::Tensor& mean,
                                     const at::Tensor& invstd, const at::Tensor& sums,
                                     const at::Tensor& count) {
  check_sync_backward_elementwise(grad_output, input, weight, mean, invstd, sums, count);
  return *form_gradients(grad_output, input, weight, mean, invstd, sums, count, std::nullopt, true,
                         false)
              .grad_input;
}

std::tuple<OptionalTensor, OptionalTensor> sync_fused_backward_elementwise(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& invstd, const at::Tensor& sums,
    const at::Tensor& count, const at::Tensor& mask, bool need_input, bool need_residual) {
  check_sync_backward_elementwise(grad_output, input, weight, mean, invstd, sums, count);
  check_mask(mask, input);
  const Backward b = form_gradients(grad_output, input, weight, mean, invstd, sums, count, mask,
                                    need_input, need_residual);
  return {b.grad_input, b.grad_residual};
}

}  // namespace batchnorm_cuda
