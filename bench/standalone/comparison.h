// Holds results against the reference, element by element, and remembers the worst.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>

#include "plan/plan.h"
#include "reference.h"

namespace bn_standalone {

// Half a unit in the last place, relative, of a value rounded to nearest.
inline double rounding_unit(batchnorm_cuda::Dtype dtype) {
  switch (dtype) {
    case batchnorm_cuda::Dtype::kHalf:
      return std::ldexp(1.0, -11);
    case batchnorm_cuda::Dtype::kBFloat16:
      return std::ldexp(1.0, -8);
    case batchnorm_cuda::Dtype::kFloat:
      return std::ldexp(1.0, -24);
    default:
      return std::ldexp(1.0, -53);
  }
}

// Tolerance: one rounding of the value to its dtype, and kAccumulatorUnits roundings of its
// magnitude in the accumulator. Batched and merged pairwise, sums of any length here stay below.
constexpr double kAccumulatorUnits = 8;

class Comparison {
 public:
  // `stored` is the dtype of the results, `acc` that of the arithmetic behind them.
  Comparison(std::string name, batchnorm_cuda::Dtype stored, batchnorm_cuda::Dtype acc)
      : name_(std::move(name)), unit_(rounding_unit(stored)), acc_unit_(rounding_unit(acc)) {}

  void add(double got, const Quantity& expected) {
    // Below the smallest normal half, rounding is absolute.
    const double smallest = unit_ == std::ldexp(1.0, -11) ? std::ldexp(1.0, -25) : 0;
    const double tolerance = unit_ * std::fabs(expected.value) + smallest +
                             kAccumulatorUnits * acc_unit_ * expected.magnitude;
    const double error = std::fabs(got - expected.value);
    const double ratio = std::isfinite(got) ? (error == 0 ? 0 : error / tolerance) : kInfinity;
    max_error_ = std::fmax(max_error_, std::isfinite(error) ? error : kInfinity);
    worst_ratio_ = std::fmax(worst_ratio_, ratio);
    ++count_;
  }

  bool passed() const { return count_ > 0 && worst_ratio_ <= 1; }

  void print() const {
    std::printf("check: %-12s max error %.3g, %.2f of its tolerance, %lld values: %s\n",
                name_.c_str(), max_error_, worst_ratio_, static_cast<long long>(count_),
                passed() ? "ok" : "WRONG");
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::string name_;
  double unit_, acc_unit_, max_error_ = 0, worst_ratio_ = 0;
  int64_t count_ = 0;
};

}  // namespace bn_standalone
