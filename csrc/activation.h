// The activations that may follow batch norm, as the numbers that kernels take. Each is piecewise
// linear, increasing, and 0 at 0, so that a bit an element says whether its slope is 1 there.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace batchnorm_cuda {

// y = min(max(z, below z, lowest), highest) with 0 <= below <= 1, the slope where the bit is not
// set; the identity as it is made. NaN is no highest value: nothing is above it.
template <typename acc_t>
struct Activation {
  acc_t lowest = -std::numeric_limits<acc_t>::infinity();
  acc_t highest = std::numeric_limits<acc_t>::quiet_NaN();
  acc_t below = 1;
  bool only_lowest = true;  // y = max(z, lowest): a ReLU or nothing
};

// What a gradient is multiplied by where the bit is not set. Of half and bfloat16 as words of two
// equal values, which add up to the slope: dy slope = dy high + dy low takes no conversion. Both
// are above 0, so that an infinite dy stays. All bits of `kept` are set unless the slope is 0,
// which makes zero of infinities and NaN, too.
template <typename acc_t>
struct Slope {
  acc_t value;
  uint32_t high, low, kept;
};

inline bool is_activation(const std::string& name) {
  return name == "relu" || name == "relu6" || name == "leaky_relu";
}

// Of a name that is one.
template <typename acc_t>
Activation<acc_t> activation_of(const std::string& name, double parameter) {
  Activation<acc_t> result;
  result.below = name == "leaky_relu" ? static_cast<acc_t>(parameter) : 0;
  if (result.below == 0) result.lowest = 0;
  if (name == "relu6") result.highest = 6;
  result.only_lowest = result.below == 0 && name != "relu6";
  return result;
}

}  // namespace batchnorm_cuda
