// The stages of a pass, from tensors to launches: what plain batch norm and synchronised batch norm
// have in common. Templates, because scalar_t goes through to the kernels.
#pragma once

#include <limits>

#include "../kernel_table.h"
#include "ops.h"
#include "tensors.h"

namespace batchnorm_cuda {

template <typename T>
inline const T* pointer_to(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// What the merge of partial results takes as `shift`.
inline int merge_shift(const Plan& plan) {
  return plan.pattern == Pattern::kAlongC ? plan.reduce.shift : 0;
}

// ---------------------------------------------------------------------------- forward

// A running statistic, or the count of batches, as the kernel updates it; copied back where its own
// memory has gaps. Autograd must see the update: a graph that saved the old values is stale.
struct UpdatedInPlace {
  explicit UpdatedInPlace(const OptionalTensor& tensor) : original(tensor), dense(packed(tensor)) {}
  void finish() const {
    if (!dense) return;
    if (!dense->is_same(*original)) {
      original->copy_(*dense);
    } else if (!original->is_inference()) {  // those have no version
      original->unsafeGetTensorImpl()->bump_version();
    }
  }
  const OptionalTensor& original;
  OptionalTensor dense;
};

// What is fused to a forward call: y = act(bn(x) + residual).
struct Fusion {
  OptionalTensor residual;
  bool relu = false, need_mask = false;
};

// Everything one forward call works on.
struct Forward {
  at::Tensor input, output, save_mean, save_invstd;
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  OptionalTensor residual, mask;
  bool relu = false;
  bool training;
  std::optional<double> momentum;
  double eps;
  Problem problem;

  // To be called when input and problem are there.
  void fuse(const Fusion& fusion) {
    relu = fusion.relu;
    if (relu && fusion.need_mask) {
      const int64_t bytes = mask_bytes_of(input);
      mask = allocate({whole_words(bytes)}, input.options().dtype(at::kByte));
      if (mask->numel() != bytes) mask = mask->narrow(0, 0, bytes);
    }
    if (fusion.residual && input.numel() > 0) {
      residual = dense_like(*fusion.residual, input);
      problem.residual_shift = shift_of(*residual);
    }
    problem.fused = relu || residual;
    problem.mask = mask.has_value();
  }
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
  params.lowest = f.relu ? acc_t(0) : -std::numeric_limits<acc_t>::infinity();
  if (f.mask) {
    TORCH_INTERNAL_ASSERT(f.problem.output_shift == 0, "the output is on no 16-byte boundary");
    params.mask = f.mask->mutable_data_ptr<uint8_t>();
    const int64_t bytes = whole_words(f.mask->numel());
    if (!t.exact) check_launch(clear_mask(params.mask, bytes, stream), "memset");
  }
  return params;
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
  result.save_mean = static_cast<acc_t*>(f.save_mean.data_ptr());
  result.save_invstd = static_cast<acc_t*>(f.save_invstd.data_ptr());
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
  params.input = static_cast<const scalar_t*>(f.input.const_data_ptr());
  params.output = static_cast<scalar_t*>(f.output.data_ptr());
  params.weight = param_pointer(f.weight);
  params.bias = param_pointer(f.bias);
  if (!f.training) {
    params.running_mean = param_pointer(f.running_mean);
    params.running_var = param_pointer(f.running_var);
  }
  params.mean = static_cast<acc_t*>(f.save_mean.data_ptr());
  params.invstd = static_cast<acc_t*>(f.save_invstd.data_ptr());
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

// Everything one backward call works on.
struct Backward {
  at::Tensor grad_output, input, save_mean, save_invstd;
  OptionalTensor weight, grad_input, grad_weight, grad_bias;
  OptionalTensor total_count;          // [1]: over several ranks
  OptionalTensor mask, grad_residual;  // grad_output is that of a fused ReLU
  Problem problem;

  bool training() const { return problem.op == Op::kBackwardTraining; }

  // Sets what is read, where `relu` is the mask on the boundaries that fused.cuh asks for.
  void read(const at::Tensor& grad_y, const at::Tensor& x, const OptionalTensor& relu) {
    mask = packed(relu);
    input = dense(x);
    if (mask) input = on_boundary(input);
    grad_output = dense_like(grad_y, input);
    if (mask) grad_output = on_boundary(grad_output);
  }

  // The outputs, which are aligned alike, for the plan. To be called when they and problem are
  // there.
  void describe_outputs() {
    problem.fused = problem.mask = mask.has_value();
    problem.output_shift = -1;
    problem.outputs = 0;
    for (const OptionalTensor* output : {&grad_input, &grad_residual}) {
      if (!*output) continue;
      const int shift = shift_of(**output);
      TORCH_INTERNAL_ASSERT(problem.outputs == 0 || shift == problem.output_shift,
                            "the allocator aligned two tensors of one size differently");
      TORCH_INTERNAL_ASSERT(shift == 0 || !mask, "an output is on no 16-byte boundary");
      problem.output_shift = shift;
      problem.outputs += 1;
    }
  }
};

// What a kernel that only reads takes, and one that writes the residual's gradient too.
template <typename scalar_t>
FusedBackward<scalar_t> fused_reads(const Backward& b) {
  FusedBackward<scalar_t> params{};
  params.numel = b.input.numel();
  params.mask = b.mask->const_data_ptr<uint8_t>();
  return params;
}
template <typename scalar_t>
FusedBackward<scalar_t> fused_params(const Backward& b) {
  FusedBackward<scalar_t> params = fused_reads<scalar_t>(b);
  if (b.grad_residual) params.grad_residual = static_cast<scalar_t*>(b.grad_residual->data_ptr());
  return params;
}

// The two sums of every channel, undefined where only grad_weight and grad_bias are wanted.
struct Sums {
  at::Tensor dy, dy_xhat;
};

template <typename scalar_t>
void run_reduce(const Backward& b, const Plan& plan, const Sums& sums, cudaStream_t stream) {
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

  MergeGradientsParams<acc_t> merge{};
  merge.partials = params.partials;
  merge.shift = merge_shift(plan);
  if (sums.dy.defined()) {
    merge.sum_dy = static_cast<acc_t*>(sums.dy.data_ptr());
    merge.sum_dy_xhat = static_cast<acc_t*>(sums.dy_xhat.data_ptr());
  }
  merge.grad_weight = param_pointer(b.grad_weight);
  merge.grad_bias = param_pointer(b.grad_bias);
  check_launch(merges<acc_t>().gradients(plan.merge, merge, stream), "merge_kernel");
}

template <typename scalar_t>
void run_elementwise(const Backward& b, const Plan& plan, const Sums& sums, cudaStream_t stream) {
  using acc_t = acc_type<scalar_t>;
  BackwardElementwiseParams<scalar_t> params{};
  params.traversal = plan.elementwise;
  params.grad_output_aligned = b.problem.grad_output_shift == b.problem.output_shift;
  params.input_aligned = b.problem.input_shift == b.problem.output_shift;
  params.count = b.problem.n * b.problem.s;
  if (b.total_count) params.total_count = pointer_to<int64_t>(*b.total_count);
  params.grad_output = pointer_to<scalar_t>(b.grad_output);
  if (b.grad_input) params.grad_input = static_cast<scalar_t*>(b.grad_input->data_ptr());
  params.weight = param_pointer(b.weight);
  params.mean = pointer_to<acc_t>(b.save_mean);
  params.invstd = pointer_to<acc_t>(b.save_invstd);
  if (b.training()) {
    params.input = pointer_to<scalar_t>(b.input);
    params.sum_dy = pointer_to<acc_t>(sums.dy);
    params.sum_dy_xhat = pointer_to<acc_t>(sums.dy_xhat);
  }
  const Pattern pattern = plan.elementwise.pattern;
  const KernelTable<scalar_t>& table = kernels<scalar_t>();
  const LaunchStatus status =
      b.problem.fused
          ? table.fused_backward_elementwise(pattern, params, fused_params<scalar_t>(b), stream)
          : table.backward_elementwise(pattern, params, stream);
  check_launch(status, "backward_elementwise_kernel");
}

}  // namespace batchnorm_cuda
