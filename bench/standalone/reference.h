// Batch norm of one channel on the CPU in double, naively from the definition, with sums in long
// double. The gradient goes by the chain rule through mean and variance, not by the collapsed form
// that the kernels compute.
//
// A result comes with its magnitude: the size of the terms it is made of. What an accumulator's
// rounding may add to the error is proportional to it.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace bn_standalone {

struct Quantity {
  double value, magnitude;
};

// What is given for a channel besides its values.
struct Channel {
  double weight, bias, running_mean, running_var, momentum, eps;
};

struct Moments {
  double mean = 0, var = 0, mean_magnitude = 0;
  double invstd(double eps) const { return 1 / std::sqrt(var + eps); }
};

inline Moments moments_of(const std::vector<double>& x) {
  long double sum = 0, absolute = 0, squares = 0;
  for (double value : x) {
    sum += value;
    absolute += std::fabs(value);
  }
  const long double mean = sum / x.size();
  for (double value : x) squares += (value - mean) * (value - mean);
  return {static_cast<double>(mean), static_cast<double>(squares / x.size()),
          static_cast<double>(absolute / x.size())};
}

inline Quantity normalized(double x, double mean, double invstd, const Channel& channel) {
  const double scale = channel.weight * invstd;
  return {(x - mean) * scale + channel.bias,
          std::fabs(scale) * (std::fabs(x) + std::fabs(mean)) + std::fabs(channel.bias)};
}

inline Quantity running_update(double running, double batch, double momentum) {
  return {(1 - momentum) * running + momentum * batch, std::fabs(running) + std::fabs(batch)};
}

struct Gradients {
  Quantity weight, bias;
  std::vector<Quantity> input;
};

// x̂ = (x - mean)·invstd, y = weight·x̂ + bias.
inline Gradients gradients_of(const std::vector<double>& x, const std::vector<double>& dy,
                              const Channel& channel) {
  const Moments moments = moments_of(x);
  const double invstd = moments.invstd(channel.eps), mean = moments.mean;
  const auto count = static_cast<long double>(x.size());
  long double bias = 0, bias_size = 0, weight = 0, weight_size = 0;
  long double d_var = 0, d_mean = 0, spread = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double centred = x[i] - static_cast<long double>(mean);
    const long double d_xhat = static_cast<long double>(dy[i]) * channel.weight;
    bias += dy[i];
    bias_size += std::fabs(dy[i]);
    weight += dy[i] * centred * invstd;
    weight_size += std::fabs(dy[i]) * (std::fabs(x[i]) + std::fabs(mean)) * invstd;
    d_var += d_xhat * centred * -0.5L * invstd * invstd * invstd;
    d_mean -= d_xhat * invstd;
    spread += centred;
  }
  d_mean += d_var * -2 * spread / count;
  Gradients result{{static_cast<double>(weight), static_cast<double>(weight_size)},
                   {static_cast<double>(bias), static_cast<double>(bias_size)},
                   {}};
  const double scale = std::fabs(channel.weight) * invstd;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double centred = x[i] - static_cast<long double>(mean);
    const long double d_xhat = static_cast<long double>(dy[i]) * channel.weight;
    const long double dx = d_xhat * invstd + d_var * 2 * centred / count + d_mean / count;
    const double xhat_size = (std::fabs(x[i]) + std::fabs(mean)) * invstd;
    result.input.push_back({static_cast<double>(dx),
                            static_cast<double>(scale * (std::fabs(dy[i]) + bias_size / count +
                                                         xhat_size * weight_size / count))});
  }
  return result;
}

}  // namespace bn_standalone
