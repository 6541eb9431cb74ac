// The plan, its problem and its device as Python dictionaries.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "plan.h"

namespace batchnorm_cuda {

pybind11::dict to_dict(const DeviceInfo& device);
PlanOptions options_from_dict(const pybind11::dict& options);

// Keys of `device` override `base`; unknown keys are a ValueError. Shifts are in elements; absent
// tensors are -1.
pybind11::dict plan_as_dict(const std::string& op, int64_t n, int64_t c, int64_t s,
                            const std::string& dtype, const DeviceInfo& base,
                            const pybind11::dict& device, const pybind11::dict& options);

// The candidates of the same problem, each with "options" that force it; keys of `costs` override
// the default costs.
std::vector<pybind11::dict> candidates_as_dicts(const std::string& op, int64_t n, int64_t c,
                                                int64_t s, const std::string& dtype,
                                                const pybind11::dict& device,
                                                const pybind11::dict& options,
                                                const pybind11::dict& costs);

// The constants of the cost model that may be fitted, and their values.
pybind11::dict cost_model_as_dict();

}  // namespace batchnorm_cuda
