// The entry points behind the Python module: check, allocate, guard the device, plan, launch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace batchnorm_cuda {

using OptionalTensor = std::optional<at::Tensor>;

// Returns (output, save_mean, save_invstd): output like input; the statistics [C] in float32
// (float64 for float64 input), of the batch (training) or from the running ones (eval).
// When training, running statistics are updated and num_batches_tracked counts the batch, in place
// and in the same launch. momentum absent: the cumulative average, 1/number of this batch.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
    double eps);

// Returns (grad_input, grad_weight, grad_bias), each only where asked for. bias lends its dtype.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& save_mean, const at::Tensor& save_invstd,
    bool training, bool need_input, bool need_weight, bool need_bias);

// ---- Fused with a residual and a ReLU: y = relu(bn(x) + residual), in one rounding; either may be
// absent. The residual is like input, of any strides.

// As forward, and the mask where it is asked for and there is a ReLU: a byte for each 16 bytes of
// the output, numbered in its memory order. Bit i of a byte says that element i of these is
// positive or NaN; bits past the last element are zero.
std::tuple<at::Tensor, at::Tensor, at::Tensor, OptionalTensor> fused_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& residual, bool relu,
    bool need_mask, bool training, std::optional<double> momentum, double eps);

// Returns (grad_input, grad_weight, grad_bias, grad_residual), each only where asked for:
// grad_residual is grad_output where the mask's bit is set, else zero, and the others are batch
// norm's of it.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> fused_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& save_mean, const at::Tensor& save_invstd,
    const at::Tensor& mask, bool training, bool need_input, bool need_weight, bool need_bias,
    bool need_residual);

// Returns (grad_grad_output, grad_input, grad_weight), each only where asked for: the gradients of
// backward's grad_output, input and weight, from those of its three results (absent: zero).
// grad_output may be absent where only grad_grad_output is asked for, which does not depend on it.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> double_backward(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_output,
    const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& save_mean,
    const at::Tensor& save_invstd, bool training, bool need_grad_output, bool need_input,
    bool need_weight);

// ---- Synchronised batch norm: the same pass in parts, between which the caller gathers what every
// rank has, [ranks, ...]. A rank's count is data and stays on the device.

// This rank's row of MomentsRow (rank_params.h): count, mean [C] and M2 [C] as values of the
// statistics' dtype, the count being the bits of one 64-bit integer. Empty input: zeros.
at::Tensor sync_statistics(const at::Tensor& input);

// Merges the gathered rows and normalises this rank's part. Returns (output, mean, invstd, count):
// statistics [C] and count [1], int64, are of all ranks. Running statistics are updated in place as
// in `forward`, unless all ranks together have fewer than two values per channel.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sync_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const at::Tensor& gathered,
    std::optional<double> momentum, double eps);

// Returns (sums, grad_weight, grad_bias): sums [2, C] are this rank's sum_dy and sum_dy_xhat, of
// which the gradients, where asked for, are copies in the parameters' dtypes.
std::tuple<at::Tensor, OptionalTensor, OptionalTensor> sync_backward_reduce(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool need_weight,
    bool need_bias);

// The sums over all ranks: gathered [ranks, ...] without its first dimension. The bits do not
// depend on the order of the ranks.
at::Tensor sync_sum(const at::Tensor& gathered);

// grad_input of this rank's part, from sums [2, C] and count [1] of all ranks.
at::Tensor sync_backward_elementwise(const at::Tensor& grad_output, const at::Tensor& input,
                                     const OptionalTensor& weight, const at::Tensor& mean,
                                     const at::Tensor& invstd, const at::Tensor& sums,
                                     const at::Tensor& count);

// ---- Both together. The mask is of this rank's part.

// As sync_forward, and the mask as of fused_forward.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, OptionalTensor> sync_fused_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const at::Tensor& gathered,
    const OptionalTensor& residual, bool relu, bool need_mask, std::optional<double> momentum,
    double eps);

std::tuple<at::Tensor, OptionalTensor, OptionalTensor> sync_fused_backward_reduce(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
    const at::Tensor& mask, bool need_weight, bool need_bias);

// Returns (grad_input, grad_residual), each only where asked for.
std::tuple<OptionalTensor, OptionalTensor> sync_fused_backward_elementwise(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& invstd, const at::Tensor& sums,
    const at::Tensor& count, const at::Tensor& mask, bool need_input, bool need_residual);

}  // namespace batchnorm_cuda
