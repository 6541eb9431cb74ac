// The arithmetic of batch normalisation, each formula once (docs/math.md derives them).
#pragma once

#include "platform.cuh"

namespace batchnorm_cuda {

__device__ __forceinline__ float inverse_sqrt(float value) { return 1.0f / sqrtf(value); }
__device__ __forceinline__ double inverse_sqrt(double value) { return 1.0 / sqrt(value); }

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// y = (x - mean) * scale + bias with scale = weight * invstd. The mean is subtracted first: folding
// it into the bias would cancel where |mean| >> std.
template <typename acc_t>
struct Normalize {
  acc_t mean, scale, bias;
  __device__ __forceinline__ acc_t operator()(acc_t x) const {
    return fused_multiply_add(x - mean, scale, bias);
  }
};

// (1 - momentum) * running + momentum * batch
template <typename acc_t>
__device__ __forceinline__ acc_t update_running(acc_t running, acc_t batch, acc_t momentum) {
  return (acc_t(1) - momentum) * running + momentum * batch;
}

// grad_input = weight*invstd * (dy - sum_dy/count - x̂ * sum_dy_xhat/count), as a line in dy and
// (x - mean). In eval mode the statistics are constants and only the first term stays.
template <typename acc_t>
struct GradInput {
  acc_t scale;                            // weight * invstd
  acc_t mean = 0, slope = 0, offset = 0;  // training only
  __device__ __forceinline__ acc_t operator()(acc_t dy, acc_t x) const {
    return fused_multiply_add(scale, dy, fused_multiply_add(slope, x - mean, offset));
  }
  __device__ __forceinline__ acc_t operator()(acc_t dy) const { return scale * dy; }
};

template <typename acc_t>
__device__ __forceinline__ GradInput<acc_t> make_grad_input(acc_t weight, acc_t mean, acc_t invstd,
                                                            acc_t sum_dy, acc_t sum_dy_xhat,
                                                            acc_t count) {
  const acc_t scale = weight * invstd;
  return {scale, mean, -scale * invstd * (sum_dy_xhat / count), -scale * (sum_dy / count)};
}

}  // namespace batchnorm_cuda
