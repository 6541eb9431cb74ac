// What the host build binds to Python beyond bindings.cpp: the device to model and the count of
// memory traffic.
#pragma once

#include <pybind11/pybind11.h>

namespace batchnorm_cuda {

void bind_host_model(pybind11::module_& m);

}  // namespace batchnorm_cuda
