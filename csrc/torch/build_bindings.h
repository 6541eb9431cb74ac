// What one of the two builds binds to Python beyond bindings.cpp: nothing for CUDA, and for the
// host build the device to model and the count of memory traffic.
#pragma once

namespace pybind11 {
class module_;  // by name alone: its header takes seconds to compile
}

namespace batchnorm_cuda {

void bind_build(pybind11::module_& m);

}  // namespace batchnorm_cuda
