// The command line of bn_standalone.
#pragma once

#include <cstdint>
#include <string>

#include "plan/plan.h"

namespace bn_standalone {

struct Options {
  batchnorm_cuda::Problem problem;
  batchnorm_cuda::PlanOptions plan;
  std::string op_name, dtype_name;
  std::string device_json;  // a file with device properties to plan for, in place of the device's
  uint64_t seed = 1;
  int repeat = 10;
  bool break_reference = false;  // plants an error in what is expected: the check must fail
};

const char* usage();

// Throws std::invalid_argument with what is wrong and what was expected.
Options parse_options(int argc, char** argv);

// Overrides the properties that a flat JSON object of DeviceInfo's fields names. Throws as above.
void read_device_json(const std::string& path, batchnorm_cuda::DeviceInfo* device);

}  // namespace bn_standalone
