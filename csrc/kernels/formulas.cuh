// The arithmetic of batch normalisation, each formula once (docs/math.md derives them).
#pragma once

#include "vec_io.cuh"

namespace batchnorm_cuda {

__device__ __forceinline__ float inverse_sqrt(float value) { return 1.0f / sqrtf(value); }
__device__ __forceinline__ double inverse_sqrt(double value) { return 1.0 / sqrt(value); }

// y = (x - mean) * scale + bias with scale = weight * invstd. The mean is subtracted first: folding
// it into the bias would cancel where |mean| >> std.
template <typename acc_t>
struct Normalize {
  static constexpr int kFields = 3;
  acc_t mean, scale, bias;
  __device__ __forceinline__ acc_t& field(int i) { return i == 0 ? mean : i == 1 ? scale : bias; }
};

// Of lanes l and l + 1, whose channels are `a` and `b`.
template <typename acc_t, typename scalar_t>
__device__ __forceinline__ Pair<acc_t> normalize(const Normalize<acc_t>& a,
                                                 const Normalize<acc_t>& b, const Vec<scalar_t>& x,
                                                 int l) {
  const Pair<acc_t> centred = lanes_plus(x, l, {-a.mean, -b.mean});
  return fused_multiply_add(centred, Pair<acc_t>{a.scale, b.scale}, Pair<acc_t>{a.bias, b.bias});
}

// (1 - momentum) * running + momentum * batch
template <typename acc_t>
__device__ __forceinline__ acc_t update_running(acc_t running, acc_t batch, acc_t momentum) {
  return (acc_t(1) - momentum) * running + momentum * batch;
}

// grad_input = weight*invstd * (dy - sum_dy/count - x̂ * sum_dy_xhat/count), as a line in dy and
// (x - mean). In eval mode the statistics are constants and only the first term stays.
template <typename acc_t>
struct GradInput {
  static constexpr int kFields = 4;
  acc_t scale;                            // weight * invstd
  acc_t mean = 0, slope = 0, offset = 0;  // training only
  __device__ __forceinline__ acc_t& field(int i) {
    return i == 0 ? scale : i == 1 ? mean : i == 2 ? slope : offset;
  }
};

// Of lanes l and l + 1, whose channels are `a` and `b`. In eval mode x is zero, where it is not
// read.
template <typename acc_t, typename scalar_t>
__device__ __forceinline__ Pair<acc_t> grad_input(const GradInput<acc_t>& a,
                                                  const GradInput<acc_t>& b,
                                                  const Vec<scalar_t>& dy, const Vec<scalar_t>& x,
                                                  int l) {
  const Pair<acc_t> centred = lanes_plus(x, l, {-a.mean, -b.mean});
  const Pair<acc_t> rest =
      fused_multiply_add(Pair<acc_t>{a.slope, b.slope}, centred, Pair<acc_t>{a.offset, b.offset});
  return fused_multiply_add(Pair<acc_t>{a.scale, b.scale}, lanes(dy, l), rest);
}

template <typename acc_t>
__device__ __forceinline__ GradInput<acc_t> make_grad_input(acc_t weight, acc_t mean, acc_t invstd,
                                                            acc_t sum_dy, acc_t sum_dy_xhat,
                                                            acc_t count) {
  const acc_t scale = weight * invstd, per_value = reciprocal(count);
  return {scale, mean, -scale * invstd * (sum_dy_xhat * per_value), -scale * (sum_dy * per_value)};
}

// The first two results of the double backward, as lines in dy, ggx (the gradient of grad_input)
// and (x - mean):
//   grad_grad_output = scale * ggx + slope * (x - mean) + offset
//   grad_input = slope * dy + mixed * ggx + curve * (x - mean) + shift
// In eval mode the statistics are constants and grad_input is slope * dy.
template <typename acc_t>
struct DoubleGrad {
  acc_t mean = 0, scale = 0, slope = 0, offset = 0;
  acc_t mixed = 0, curve = 0, shift = 0;  // training only
  __device__ __forceinline__ acc_t grad_grad_output(acc_t ggx, acc_t x) const {
    return fused_multiply_add(scale, ggx, fused_multiply_add(slope, x - mean, offset));
  }
  __device__ __forceinline__ acc_t grad_input(acc_t dy, acc_t ggx, acc_t x) const {
    const acc_t line = fused_multiply_add(curve, x - mean, shift);
    return fused_multiply_add(slope, dy, fused_multiply_add(mixed, ggx, line));
  }
  __device__ __forceinline__ acc_t grad_input(acc_t dy) const { return slope * dy; }
};

// <ggx·dy> - <ggx><dy> - <ggx·x̂><dy·x̂>: what is left of the product of the two gradients when both
// are freed of their mean and of their part along x̂.
template <typename acc_t, typename Sums>
__device__ __forceinline__ acc_t centred_product(const Sums& sums, acc_t count) {
  const acc_t per_value = acc_t(1) / count;  // a division of doubles is a call
  return sums.sum_ggx_dy * per_value - (sums.sum_ggx * per_value) * (sums.sum_dy * per_value) -
         (sums.sum_ggx_xhat * per_value) * (sums.sum_dy_xhat * per_value);
}

// In eval mode. ggw and ggb are the gradients of grad_weight and grad_bias.
template <typename acc_t>
__device__ __forceinline__ DoubleGrad<acc_t> make_double_grad_eval(acc_t weight, acc_t mean,
                                                                   acc_t invstd, acc_t ggw,
                                                                   acc_t ggb) {
  return {mean, weight * invstd, ggw * invstd, ggb};
}

template <typename acc_t, typename Sums>
__device__ __forceinline__ DoubleGrad<acc_t> make_double_grad(acc_t weight, acc_t mean,
                                                              acc_t invstd, acc_t ggw, acc_t ggb,
                                                              const Sums& sums, acc_t count) {
  DoubleGrad<acc_t> f{mean, weight * invstd};
  const acc_t dy_xhat = sums.sum_dy_xhat / count, ggx_xhat = sums.sum_ggx_xhat / count;
  f.slope = invstd * (ggw - f.scale * ggx_xhat);
  f.offset = ggb - f.scale * (sums.sum_ggx / count);
  f.mixed = -f.scale * invstd * dy_xhat;
  f.curve = -invstd * (f.scale * invstd * centred_product(sums, count) + f.slope * dy_xhat +
                       f.mixed * ggx_xhat);
  f.shift = -f.slope * (sums.sum_dy / count) - f.mixed * (sums.sum_ggx / count);
  return f;
}

}  // namespace batchnorm_cuda
