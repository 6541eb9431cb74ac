// The plan, its problem and its device as named values, which bindings.cpp makes dictionaries of.
// No Python here: pybind11 costs the compiler ten times what all of this does.
#pragma once

#include <string>
#include <vector>

#include "named_values.h"
#include "plan.h"

namespace batchnorm_cuda {

NamedValues to_values(const DeviceInfo& device);

// Here and below: unknown names, and values that are no choice, are a std::invalid_argument.
PlanOptions options_from_values(NamedValues left);

// Values of `device` override the default device. Shifts are in elements; absent tensors are -1.
NamedValues plan_as_values(const std::string& op, int64_t n, int64_t c, int64_t s,
                           const std::string& dtype, const NamedValues& device,
                           const NamedValues& options);

// The candidates of the same problem, each with "options" that force it; values of `costs` override
// the default costs.
std::vector<NamedValues> candidates_as_values(const std::string& op, int64_t n, int64_t c,
                                              int64_t s, const std::string& dtype,
                                              const NamedValues& device, const NamedValues& options,
                                              const NamedValues& costs);

// The constants of the cost model that may be fitted, and their values.
NamedValues cost_model_as_values();

}  // namespace batchnorm_cuda
