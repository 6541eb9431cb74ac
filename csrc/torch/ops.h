// The entry points behind the Python module: check, allocate, guard the device, plan, launch. They
// take a record over, with its references to tensors.
#pragma once

#include "calls.h"

namespace batchnorm_cuda {

// The output, like the input, and the statistics [C] in float32 (float64 for float64 input) that it
// was normalised by: of the batch (training), of all ranks' batches (gathered) with their number of
// values per channel, or the running ones (eval).
// When training, running statistics are updated and num_batches_tracked counts the batch, in place
// and in the same launch. Fewer than two values per channel in all ranks together leave the running
// statistics as they are.
// Fused, the output is relu(bn(x) + residual), in one rounding; either may be absent. The residual
// is like the input, of any strides. The mask, where it is asked for and there is a ReLU, is a byte
// for each 16 bytes of the output, numbered in its memory order. Bit i of a byte says that element
// i of these is positive or NaN; bits past the last element are zero.
Normalized forward(ForwardCall call);

// The gradients that are asked for. With a mask grad_residual is grad_output where its bit is set,
// else zero, and the others are batch norm's of it. With sums [2, C] and count [1] of all ranks
// there is no other reduction: grad_weight and grad_bias are those of reduce_gradients.
Gradients backward(BackwardCall call);

// This rank's sum_dy and sum_dy_xhat, [2, C], of which the gradients, where asked for, are copies
// in the parameters' dtypes.
OwnGradients reduce_gradients(BackwardCall call);

// The gradients of backward's grad_output, input and weight that are asked for, from those of its
// three results (absent: zero). grad_output may be absent where only grad_grad_output is asked for,
// which does not depend on it.
DoubleGradients double_backward(DoubleBackwardCall call);

// ---- What ranks tell each other. The caller gathers what every rank has, [ranks, ...]; a rank's
// count is data and stays on the device.

// This rank's row of MomentsRow (rank_params.h): count, mean [C] and M2 [C] as values of the
// statistics' dtype, the count being the bits of one 64-bit integer. Empty input: zeros.
at::Tensor statistics(const at::Tensor& input);

// The sums over all ranks: gathered [ranks, ...] without its first dimension. The bits do not
// depend on the order of the ranks.
at::Tensor sum_ranks(const at::Tensor& gathered);

}  // namespace batchnorm_cuda
