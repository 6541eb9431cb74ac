// The activations that may follow batch norm, as the numbers that kernels take. Each is increasing
// and 0 at 0, so that a bit an element says on which side it was.
#pragma once

#include <limits>
#include <string>

namespace batchnorm_cuda {

// y = max(z, below z, lowest) with 0 <= below <= 1, the slope where z is negative; the identity as
// it is made.
template <typename acc_t>
struct Activation {
  acc_t lowest = -std::numeric_limits<acc_t>::infinity();
  acc_t below = 1;
};

inline bool is_activation(const std::string& name) {
  return name == "relu" || name == "leaky_relu";
}

// Of a name that is one.
template <typename acc_t>
Activation<acc_t> activation_of(const std::string& name, double parameter) {
  Activation<acc_t> result;
  result.below = name == "leaky_relu" ? static_cast<acc_t>(parameter) : 0;
  if (result.below == 0) result.lowest = 0;
  return result;
}

}  // namespace batchnorm_cuda
