// The launches of one operation in their order, with device memory in place of the tensors that
// csrc/torch/forward.cpp and csrc/torch/backward.cpp work on.
#pragma once

#include <stdexcept>
#include <string>

#include "kernel_table.h"

namespace bn_standalone {

// Everything one call works on. Pointers to device memory; [C] vectors are of acc_t.
template <typename scalar_t>
struct Call {
  using acc_t = batchnorm_cuda::acc_type<scalar_t>;
  batchnorm_cuda::Problem problem;
  double eps, momentum;
  const scalar_t *input, *grad_output;  // [N, C, S]
  scalar_t* output;                     // [N, C, S], grad_input in the backward pass
  acc_t *weight, *bias, *running_mean, *running_var;
  acc_t *mean, *invstd;  // left by the forward pass, read by the backward pass
  acc_t *sum_dy, *sum_dy_xhat, *grad_weight, *grad_bias;
  void* workspace;  // Plan::workspace_bytes
  uint64_t* sync;   // Team::sync_words, zero before the first launch

  batchnorm_cuda::ParamPointer param(acc_t* data) const {
    const bool wide = sizeof(acc_t) == sizeof(double);
    return {data, wide ? batchnorm_cuda::Dtype::kDouble : batchnorm_cuda::Dtype::kFloat};
  }
  batchnorm_cuda::Partials<acc_t> partials(const batchnorm_cuda::Plan& plan) const {
    return {static_cast<acc_t*>(workspace), plan.merge.rows, problem.c};
  }
};

inline void check_launch(batchnorm_cuda::LaunchStatus status, const char* kernel) {
  if (status == 0) return;
  throw std::runtime_error(std::string("launching ") + kernel +
                           " failed: " + batchnorm_cuda::describe_status(status));
}

// What every merge of partial results takes.
template <template <typename> class Params, typename acc_t>
Params<acc_t> merge_params(const batchnorm_cuda::Plan& plan,
                           const batchnorm_cuda::Partials<acc_t>& partials) {
  Params<acc_t> params{};
  params.partials = partials;
  params.shift = plan.pattern == batchnorm_cuda::Pattern::kAlongC ? plan.reduce.shift : 0;
  return params;
}

template <typename scalar_t>
auto statistics_output(const Call<scalar_t>& call) {
  batchnorm_cuda::StatisticsOutput<typename Call<scalar_t>::acc_t> result{};
  result.c = call.problem.c;
  result.count = call.problem.n * call.problem.s;
  result.eps = call.eps;
  result.momentum = call.momentum;
  result.save_mean = call.mean;
  result.save_invstd = call.invstd;
  result.running_mean = call.param(call.running_mean);
  result.running_var = call.param(call.running_var);
  return result;
}

// What kernels take that write the output, and those that write grad_input.
template <typename Params, typename scalar_t>
void set_forward(Params& params, const Call<scalar_t>& call) {
  params.input = call.input;
  params.output = call.output;
  params.weight = call.param(call.weight);
  params.bias = call.param(call.bias);
}
template <typename Params, typename scalar_t>
void set_backward(Params& params, const Call<scalar_t>& call) {
  params.count = call.problem.n * call.problem.s;
  params.grad_output = call.grad_output;
  params.input = call.input;
  params.grad_input = call.output;
  params.weight = call.param(call.weight);
  params.mean = call.mean;
  params.invstd = call.invstd;
}

// What every team kernel takes.
template <typename Params, typename scalar_t>
Params team_params(const Call<scalar_t>& call, const batchnorm_cuda::Plan& plan) {
  Params params{};
  params.team = plan.team;
  params.slots = static_cast<typename Params::acc_t*>(call.workspace);
  params.sync = call.sync;
  return params;
}

template <typename scalar_t>
batchnorm_cuda::LaunchStatus launch_forward_team(const Call<scalar_t>& call,
                                                 const batchnorm_cuda::Plan& plan) {
  auto params = team_params<batchnorm_cuda::TeamForwardParams<scalar_t>>(call, plan);
  set_forward(params, call);
  params.statistics = statistics_output(call);
  return batchnorm_cuda::kernels<scalar_t>().team_forward(params, nullptr);
}

template <typename scalar_t>
void launch_forward_stages(const Call<scalar_t>& call, const batchnorm_cuda::Plan& plan) {
  using acc_t = typename Call<scalar_t>::acc_t;
  const auto& table = batchnorm_cuda::kernels<scalar_t>();
  const bool training = call.problem.op == batchnorm_cuda::Op::kForwardTraining;
  if (training) {
    batchnorm_cuda::StatisticsParams<scalar_t> params{};
    params.traversal = plan.reduce;
    params.input = call.input;
    params.partials = call.partials(plan);
    check_launch(table.statistics(plan.pattern, params, nullptr), "collect_statistics_kernel");
    auto merge = merge_params<batchnorm_cuda::MergeStatisticsParams>(plan, params.partials);
    merge.statistics = statistics_output(call);
    check_launch(batchnorm_cuda::merges<acc_t>().statistics(plan.merge, merge, nullptr),
                 "merge_kernel");
  }
  batchnorm_cuda::NormalizeParams<scalar_t> params{};
  params.traversal = plan.elementwise;
  params.input_aligned = true;
  params.use_running = !training;
  params.eps = call.eps;
  set_forward(params, call);
  if (!training) {
    params.running_mean = call.param(call.running_mean);
    params.running_var = call.param(call.running_var);
  }
  params.mean = call.mean;
  params.invstd = call.invstd;
  check_launch(table.normalize(plan.elementwise.pattern, params, nullptr),
               "transform_input_kernel");
}

template <typename scalar_t>
batchnorm_cuda::LaunchStatus launch_backward_team(const Call<scalar_t>& call,
                                                  const batchnorm_cuda::Plan& plan) {
  auto params = team_params<batchnorm_cuda::TeamBackwardParams<scalar_t>>(call, plan);
  set_backward(params, call);
  params.training = true;
  params.grad_weight = call.param(call.grad_weight);
  params.grad_bias = call.param(call.grad_bias);
  return batchnorm_cuda::kernels<scalar_t>().team_backward(params, nullptr);
}

template <typename scalar_t>
void launch_backward_stages(const Call<scalar_t>& call, const batchnorm_cuda::Plan& plan) {
  using acc_t = typename Call<scalar_t>::acc_t;
  const auto& table = batchnorm_cuda::kernels<scalar_t>();
  batchnorm_cuda::BackwardReduceParams<scalar_t> reduce{};
  reduce.traversal = plan.reduce;
  reduce.grad_output_aligned = true;
  reduce.grad_output = call.grad_output;
  reduce.input = call.input;
  reduce.mean = call.mean;
  reduce.invstd = call.invstd;
  reduce.partials = call.partials(plan);
  check_launch(table.backward_reduce(plan.pattern, reduce, nullptr), "backward_reduce_kernel");

  auto merge = merge_params<batchnorm_cuda::MergeGradientsParams>(plan, reduce.partials);
  merge.sum_dy = call.sum_dy;
  merge.sum_dy_xhat = call.sum_dy_xhat;
  merge.grad_weight = call.param(call.grad_weight);
  merge.grad_bias = call.param(call.grad_bias);
  check_launch(batchnorm_cuda::merges<acc_t>().gradients(plan.merge, merge, nullptr),
               "merge_kernel");

  batchnorm_cuda::BackwardElementwiseParams<scalar_t> params{};
  params.traversal = plan.elementwise;
  params.grad_output_aligned = true;
  params.input_aligned = true;
  set_backward(params, call);
  params.sum_dy = call.sum_dy;
  params.sum_dy_xhat = call.sum_dy_xhat;
  check_launch(table.backward_elementwise(plan.elementwise.pattern, params, nullptr),
               "backward_elementwise_kernel");
}

// Enqueues the operation as planned on the default stream. False, with nothing launched, where a
// team is refused.
template <typename scalar_t>
bool launch_call(const Call<scalar_t>& call, const batchnorm_cuda::Plan& plan) {
  const bool backward = call.problem.op == batchnorm_cuda::Op::kBackwardTraining;
  if (plan.strategy == batchnorm_cuda::Strategy::kTeam) {
    const batchnorm_cuda::LaunchStatus status =
        backward ? launch_backward_team(call, plan) : launch_forward_team(call, plan);
    if (batchnorm_cuda::is_refused(status)) return false;
    check_launch(status, "team_kernel");
  } else if (backward) {
    launch_backward_stages(call, plan);
  } else {
    launch_forward_stages(call, plan);
  }
  return true;
}

}  // namespace bn_standalone
