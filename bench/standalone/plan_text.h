// The plan in words.
#pragma once

#include "plan/plan.h"

namespace bn_standalone {

void print_plan(const batchnorm_cuda::Plan& plan);

}  // namespace bn_standalone
