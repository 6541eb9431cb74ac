// Argument checks of the entry points. Each throws before anything is allocated or written:
// TypeError for a dtype, ValueError for a shape or value, RuntimeError for a device, always as
// "batch_norm: expected <argument> to <what>, got <what came>".
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops.h"

namespace batchnorm_cuda {

void check_forward(const at::Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                   bool training, std::optional<double> momentum, double eps);

// The residual of a forward pass, if there is one.
void check_residual(const OptionalTensor& residual, const at::Tensor& input);

void check_backward(const at::Tensor& grad_output, const at::Tensor& input,
                    const OptionalTensor& weight, const OptionalTensor& bias,
                    const at::Tensor& save_mean, const at::Tensor& save_invstd, bool need_weight,
                    bool need_bias);

// The mask of a ReLU that a fused forward pass of the input wrote.
void check_mask(const at::Tensor& mask, const at::Tensor& input);

void check_double_backward(const OptionalTensor& grad_grad_input,
                           const OptionalTensor& grad_grad_weight,
                           const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_output,
                           const at::Tensor& input, const OptionalTensor& weight,
                           const at::Tensor& save_mean, const at::Tensor& save_invstd,
                           bool need_input, bool need_weight);

void check_sync_statistics(const at::Tensor& input);

void check_sync_forward(const at::Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, const at::Tensor& gathered,
                        std::optional<double> momentum, double eps);

void check_sum_ranks(const at::Tensor& gathered);

void check_sync_backward_elementwise(const at::Tensor& grad_output, const at::Tensor& input,
                                     const OptionalTensor& weight, const at::Tensor& mean,
                                     const at::Tensor& invstd, const at::Tensor& sums,
                                     const at::Tensor& count);

}  // namespace batchnorm_cuda
