// Values in words, for messages. No number goes through a stream here: a toolchain may link
// libstdc++ into the extension, which then has a copy of its own beside libtorch's; a stream of one
// copy looks up the formats of numbers under the other's indices, and ends in a segmentation fault
// (seen on Ubuntu 24.04 with PyTorch 2.11, where the module named no libstdc++.so.6).
#pragma once

#include <c10/core/Device.h>
#include <c10/util/ArrayRef.h>

#include <cstdio>
#include <string>

namespace batchnorm_cuda {

// As a stream prints it, to six digits.
inline std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", value);
  return digits;
}

// [2, 3, 4]
inline std::string text(at::IntArrayRef sizes) {
  std::string result = "[";
  for (size_t d = 0; d < sizes.size(); ++d) {
    result += (d > 0 ? ", " : "") + std::to_string(sizes[d]);
  }
  return result + "]";
}

inline std::string text(c10::Device device) { return device.str(); }
inline std::string text(c10::DeviceType type) { return c10::DeviceTypeName(type, true); }

}  // namespace batchnorm_cuda
