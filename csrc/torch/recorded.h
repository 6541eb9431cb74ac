// Forward and backward as a node of autograd's graph. In plain training the backward is the kernels
// alone and Python takes no part in it.
#pragma once

#include <functional>

#include "calls.h"

namespace batchnorm_cuda {

// The output, with a gradient where one is to be recorded: not over several ranks.
at::Tensor recorded(ForwardCall call);

// Gives the gradients where somebody else has to see what is done: they are themselves recorded or
// transformed, or a gradient is of a subclass or stands for a batch of them. Set once.
using SeenBackward = std::function<Gradients(const BackwardCall&)>;
void set_seen_backward(SeenBackward backward);

}  // namespace batchnorm_cuda
