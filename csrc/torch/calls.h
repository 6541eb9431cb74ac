// What a pass of batch norm takes and gives: the one place in C++ where its arguments are listed.
// bindings.cpp fills a record, everything behind it passes the record on. The counterpart in Python
// is batchnorm_cuda/_ops/calls.py, which says what each field means.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace batchnorm_cuda {

using OptionalTensor = std::optional<at::Tensor>;

struct ForwardCall {
  at::Tensor input;  // [N, C, *]
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  bool training = true;
  std::optional<double> momentum;  // absent: the cumulative average, 1/number of this batch
  double eps = 0;
  OptionalTensor residual;
  bool relu = false, need_mask = false;
  OptionalTensor gathered;  // the moments of all ranks: they stand for the batch's own
  std::string activation = "relu";
  double parameter = 0;
};

struct Normalized {
  at::Tensor output, mean, invstd;
  OptionalTensor count, mask;
};

struct BackwardCall {
  at::Tensor grad_output, input;
  OptionalTensor weight, bias;  // bias lends its dtype
  at::Tensor save_mean, save_invstd;
  bool training = true, need_input = false, need_weight = false, need_bias = false;
  OptionalTensor mask;
  bool need_residual = false;
  OptionalTensor sums, count;  // of all ranks: they stand for the batch's own
  std::string activation = "relu";
  double parameter = 0;
};

struct Gradients {
  OptionalTensor grad_input, grad_weight, grad_bias, grad_residual;
};

// What a rank knows before it asks the others.
struct OwnGradients {
  at::Tensor sums;
  OptionalTensor grad_weight, grad_bias;
};

struct DoubleBackwardCall {
  OptionalTensor grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output;
  at::Tensor input;
  OptionalTensor weight;
  at::Tensor save_mean, save_invstd;
  bool training = true, need_grad_output = false, need_input = false, need_weight = false;
};

struct DoubleGradients {
  OptionalTensor grad_grad_output, grad_input, grad_weight;
};

}  // namespace batchnorm_cuda
