// Argument checks of the entry points. Each throws before anything is allocated or written:
// TypeError for a dtype, ValueError for a shape or value, RuntimeError for a device, always as
// "batch_norm: expected <argument> to <what>, got <what came>".
#pragma once

#include "calls.h"

namespace batchnorm_cuda {

void check(const ForwardCall& call);
void check(const BackwardCall& call);
void check(const DoubleBackwardCall& call);
void check_statistics(const at::Tensor& input);
void check_sum_ranks(const at::Tensor& gathered);

}  // namespace batchnorm_cuda
