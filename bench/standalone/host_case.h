// Random inputs of one problem, held as the device gets them.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "device_memory.h"
#include "params.h"
#include "reference.h"

namespace bn_standalone {

constexpr double kEps = 1e-5, kMomentum = 0.1;

template <typename scalar_t>
struct HostCase {
  using acc_t = batchnorm_cuda::acc_type<scalar_t>;

  batchnorm_cuda::Problem problem;
  std::vector<scalar_t> x, dy;  // [N, C, S]; dy in the backward pass only
  std::vector<acc_t> weight, bias, running_mean, running_var;

  HostCase(const batchnorm_cuda::Problem& given, uint64_t seed) : problem(given) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.5, 2.0);
    std::vector<double> centre, spread;
    for (int64_t c = 0; c < problem.c; ++c) {
      weight.push_back(static_cast<acc_t>(uniform(random)));
      bias.push_back(static_cast<acc_t>(normal(random)));
      running_mean.push_back(static_cast<acc_t>(normal(random)));
      running_var.push_back(static_cast<acc_t>(uniform(random)));
      centre.push_back(2 * normal(random));
      spread.push_back(uniform(random));
    }
    const bool backward = problem.op == batchnorm_cuda::Op::kBackwardTraining;
    for (int64_t i = 0; i < size(); ++i) {
      const auto c = static_cast<size_t>(i / problem.s % problem.c);
      x.push_back(from_double<scalar_t>(centre[c] + spread[c] * normal(random)));
      // Not centred and not independent of x: both sums of the gradient matter.
      if (backward) dy.push_back(from_double<scalar_t>(0.5 * to_double(x.back()) + normal(random)));
    }
  }

  int64_t size() const { return problem.n * problem.c * problem.s; }

  Channel channel(int64_t c) const {
    const auto i = static_cast<size_t>(c);
    return {weight[i], bias[i], running_mean[i], running_var[i], kMomentum, kEps};
  }

  // The values of channel c of a tensor [N, C, S].
  std::vector<double> values(const std::vector<scalar_t>& tensor, int64_t c) const {
    std::vector<double> result;
    for (int64_t n = 0; n < problem.n; ++n) {
      for (int64_t s = 0; s < problem.s; ++s) {
        result.push_back(to_double(tensor[(n * problem.c + c) * problem.s + s]));
      }
    }
    return result;
  }
};

}  // namespace bn_standalone
