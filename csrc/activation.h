// The activations that may follow batch norm, as the numbers that kernels take. Each is increasing
// and 0 at 0, so that a bit an element says on which side it was.
#pragma once

#include <limits>
#include <string>

namespace batchnorm_cuda {

// y = max(z, lowest); the identity as it is made.
template <typename acc_t>
struct Activation {
  acc_t lowest = -std::numeric_limits<acc_t>::infinity();
};

inline bool is_activation(const std::string& name) { return name == "relu"; }

// Of a name that is one.
template <typename acc_t>
Activation<acc_t> activation_of(const std::string& name, double /*parameter*/) {
  Activation<acc_t> result;
  if (name == "relu") result.lowest = 0;
  return result;
}

}  // namespace batchnorm_cuda
