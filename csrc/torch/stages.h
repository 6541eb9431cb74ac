// The stages of a pass, from tensors to launches: what plain batch norm and synchronised batch norm
// have in common. Templates, because scalar_t goes through to the kernels.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>
#include <utility>

#include "../kernel_table.h"
#include "ops.h"
#include "tensors.h"

namespace batchnorm_cuda {

template <typename T>
inline const T* pointer_to(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// What every merge of partial results takes.
template <template <typename> class Params, typename acc_t>
Params<acc_t> merge_params(const Plan& plan, const Partials<acc_t>& partials) {
  Params<acc_t> params{};
  params.partials = partials;
  params.shift = plan.pattern == Pattern::kAlongC ? plan.reduce.shift : 0;
  return params;
}

// The stages alone: a team kernel cannot stop for the other ranks.
const Plan& plan_parts(const Problem& problem, const at::Tensor& input);

// ---------------------------------------------------------------------------- forward

// A running statistic, or the count of batches, as the kernel updates it; copied back where its own
// memory has gaps. Autograd must see the update: a graph that saved the old values is stale.
struct UpdatedInPlace {
  explicit UpdatedInPlace(OptionalTensor& tensor) : taken(tensor) {
    if (!taken || is_packed(*taken)) return;
    original = taken;
    taken = packed(std::move(taken));
  }
  void finish() const {
    if (original) {
      original->copy_(*taken);
    } else if (taken && !taken->is_inference()) {  // those have no version
      taken->unsafeGetTensorImpl()->bump_version();
    }
  }
  OptionalTensor& taken;    // by the kernel
  OptionalTensor original;  // if that is another
};

// A forward call at work: its tensors as kernels take them, its results and its geometry.
struct Forward : ForwardCall, Normalized {
  Problem problem;
};

// What the kernel of the traversal takes. Enqueues the clearing of the mask where it needs that.
template <typename scalar_t>
FusedForward<scalar_t> fused_params(const Forward& f, const Traversal& t, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  FusedForward<scalar_t> params{};
  params.numel = t.numel;
  params.exact = t.exact;
  params.residual_aligned = f.problem.residual_shift == f.problem.output_shift;
  if (f.residual) params.residual = static_cast<const scalar_t*>(f.residual->const_data_ptr());
  if (f.relu) params.activation = activation_of<acc_t>(f.activation, f.parameter);
  if (f.mask) {
    TORCH_INTERNAL_ASSERT(f.problem.output_shift == 0, "the output is on no 16-byte boundary");
    params.mask = f.mask->mutable_data_ptr<uint8_t>();
    const int64_t bytes = whole_words(f.mask->numel());
    if (!t.exact) check_launch(clear_mask(params.mask, bytes, stream), "memset");
  }
  return params;
}

// The tensors of a kernel that writes the output.
template <typename scalar_t, typename Params>
void set_tensors(Params& params, const Forward& f) {
  params.input = pointer_to<scalar_t>(f.input);
  params.output = static_cast<scalar_t*>(f.output.data_ptr());
  params.weight = param_pointer(f.weight);
  params.bias = param_pointer(f.bias);
}

template <typename acc_t>
StatisticsOutput<acc_t> statistics_output(const Forward& f) {
  StatisticsOutput<acc_t> result{};
  result.c = f.problem.c;
  result.count = f.problem.n * f.problem.s;
  result.eps = f.eps;
  result.momentum = f.momentum.value_or(0.0);
  if (f.num_batches_tracked) {
    result.num_batches_tracked = f.num_batches_tracked->mutable_data_ptr<int64_t>();
    if (!f.momentum && f.running_mean) result.arrival_shift = arrival_shift_for(f.problem.c);
  }
  result.save_mean = static_cast<acc_t*>(f.mean.data_ptr());
  result.save_invstd = static_cast<acc_t*>(f.invstd.data_ptr());
  result.running_mean = param_pointer(f.running_mean);
  result.running_var = param_pointer(f.running_var);
  return result;
}

// Leaves the partial statistics of every split in the workspace.
template <typename scalar_t>
Partials<acc_type<scalar_t>> collect_statistics(const Forward& f, const Plan& plan,
                                                const Workspace& workspace, cudaStream_t stream) {
  StatisticsParams<scalar_t> params{};
  params.traversal = plan.reduce;
  params.input = pointer_to<scalar_t>(f.input);
  params.partials = {workspace.data<acc_type<scalar_t>>(), plan.merge.rows, plan.reduce.c};
  check_launch(kernels<scalar_t>().statistics(plan.pattern, params, stream),
               "collect_statistics_kernel");
  return params.partials;
}

template <typename scalar_t>
void run_normalize(const Forward& f, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  NormalizeParams<scalar_t> params{};
  params.traversal = plan.elementwise;
  params.input_aligned = f.problem.input_shift == f.problem.output_shift;
  params.use_running = !f.training;
  params.eps = f.eps;
  set_tensors<scalar_t>(params, f);
  if (!f.training) {
    params.running_mean = param_pointer(f.running_mean);
    params.running_var = param_pointer(f.running_var);
  }
  params.mean = static_cast<acc_t*>(f.mean.data_ptr());
  params.invstd = static_cast<acc_t*>(f.invstd.data_ptr());
  const Pattern pattern = plan.elementwise.pattern;
  const KernelTable<scalar_t>& table = kernels<scalar_t>();
  const LaunchStatus status =
      f.problem.fused
          ? table.fused_normalize(pattern, params,
                                  fused_params<scalar_t>(f, plan.elementwise, stream), stream)
          : table.normalize(pattern, params, stream);
  check_launch(status, "transform_input_kernel");
}

// ---------------------------------------------------------------------------- backward

// A backward call at work.
struct Backward : BackwardCall, Gradients {
  Problem problem;

  // Do the statistics depend on the input? Else they are constants, as in eval mode.
  bool statistics() const { return problem.op == Op::kBackwardTraining; }
};

// Of the activation where a bit is not set. Two halves are 21 bits of it, or what is above 2^-25.
template <typename scalar_t>
Slope<acc_type<scalar_t>> slope_of(const std::string& activation, double parameter) {
  using stored_t = std::conditional_t<std::is_same_v<scalar_t, __half>, c10::Half, c10::BFloat16>;
  Slope<acc_type<scalar_t>> slope{};
  slope.value = activation_of<acc_type<scalar_t>>(activation, parameter).below;
  if constexpr (!std::is_same_v<scalar_t, acc_type<scalar_t>>) {
    stored_t high(slope.value);
    if (static_cast<float>(high) > slope.value) --high.x;  // the next towards zero
    if (high.x > 0) --high.x;
    const stored_t low(slope.value - static_cast<float>(high));
    slope.high = high.x * 0x10001u;
    slope.low = low.x * 0x10001u;
    slope.kept = slope.value == 0 ? 0 : ~0u;
  }
  return slope;
}

// What a kernel that only reads takes, and one that writes the residual's gradient too.
template <typename scalar_t>
FusedBackward<scalar_t> fused_reads(const Backward& b) {
  FusedBackward<scalar_t> params{};
  params.numel = b.input.numel();
  params.mask = b.mask->const_data_ptr<uint8_t>();
  params.below = slope_of<scalar_t>(b.activation, b.parameter);
  return params;
}
template <typename scalar_t>
FusedBackward<scalar_t> fused_params(const Backward& b) {
  FusedBackward<scalar_t> params = fused_reads<scalar_t>(b);
  if (b.grad_residual) params.grad_residual = static_cast<scalar_t*>(b.grad_residual->data_ptr());
  return params;
}

// The tensors of a kernel that writes grad_input, but for the input: in eval it takes no part.
template <typename scalar_t, typename Params>
void set_tensors(Params& params, const Backward& b) {
  using acc_t = acc_type<scalar_t>;
  params.count = b.problem.n * b.problem.s;
  params.grad_output = pointer_to<scalar_t>(b.grad_output);
  if (b.grad_input) params.grad_input = static_cast<scalar_t*>(b.grad_input->data_ptr());
  params.weight = param_pointer(b.weight);
  params.mean = pointer_to<acc_t>(b.save_mean);
  params.invstd = pointer_to<acc_t>(b.save_invstd);
}

// Leaves the sums [2, C] of every channel where `b.sums` is there to take them.
template <typename scalar_t>
void run_reduce(const Backward& b, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  const Workspace workspace = allocate_workspace(plan, b.input);
  BackwardReduceParams<scalar_t> params{};
  params.traversal = plan.reduce;
  params.grad_output_aligned = b.problem.grad_output_shift == b.problem.input_shift;
  params.grad_output = pointer_to<scalar_t>(b.grad_output);
  params.input = pointer_to<scalar_t>(b.input);
  params.mean = pointer_to<acc_t>(b.save_mean);
  params.invstd = pointer_to<acc_t>(b.save_invstd);
  params.partials = {workspace.data<acc_t>(), plan.merge.rows, plan.reduce.c};
  const KernelTable<scalar_t>& table = kernels<scalar_t>();
  const LaunchStatus status =
      b.problem.fused
          ? table.fused_backward_reduce(plan.pattern, params, fused_reads<scalar_t>(b), stream)
          : table.backward_reduce(plan.pattern, params, stream);
  check_launch(status, "backward_reduce_kernel");

  auto merge = merge_params<MergeGradientsParams>(plan, params.partials);
  if (b.sums) {
    merge.sum_dy = static_cast<acc_t*>(b.sums->data_ptr());
    merge.sum_dy_xhat = merge.sum_dy + b.problem.c;
  }
  merge.grad_weight = param_pointer(b.grad_weight);
  merge.grad_bias = param_pointer(b.grad_bias);
  check_launch(merges<acc_t>().gradients(plan.merge, merge, stream), "merge_kernel");
}

template <typename scalar_t>
void run_elementwise(const Backward& b, const Plan& plan, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  BackwardElementwiseParams<scalar_t> params{};
  params.traversal = plan.elementwise;
  params.grad_output_aligned = b.problem.grad_output_shift == b.problem.output_shift;
  params.input_aligned = b.problem.input_shift == b.problem.output_shift;
  set_tensors<scalar_t>(params, b);
  if (b.count) params.total_count = pointer_to<int64_t>(*b.count);
  if (b.statistics()) {
    params.input = pointer_to<scalar_t>(b.input);
    params.sum_dy = pointer_to<acc_t>(*b.sums);
    params.sum_dy_xhat = params.sum_dy + b.problem.c;
  }
  const Pattern pattern = plan.elementwise.pattern;
  const KernelTable<scalar_t>& table = kernels<scalar_t>();
  const LaunchStatus status =
      b.problem.fused
          ? table.fused_backward_elementwise(pattern, params, fused_params<scalar_t>(b), stream)
          : table.backward_elementwise(pattern, params, stream);
  check_launch(status, "backward_elementwise_kernel");
}

// ---------------------------------------------------------------------------- teams

// What every team kernel takes, with the tensors of the call.
template <typename Params, typename Call>
Params team_params(const Call& call, const Plan& plan, const Workspace& workspace) {
  Params params{};
  set_tensors<typename Params::scalar_t>(params, call);
  params.team = plan.team;
  params.slots = workspace.data<typename Params::acc_t>();
  params.sync = workspace.words();
  return params;
}

}  // namespace batchnorm_cuda
