// Backward in two reads and one write of the activations: both sums and grad_input of a channel
// group by one team of blocks (team_kernel.cuh), which keeps dy and x on chip in between.
#pragma once

#include "formulas.cuh"
#include "team_kernel.cuh"

namespace batchnorm_cuda {

template <typename Cursor>
struct TeamBackward {
  using scalar_t = typename Cursor::scalar_t;
  using acc_t = acc_type<scalar_t>;
  using Params = TeamBackwardParams<scalar_t>;
  using Acc = GradSums<acc_t>;
  static constexpr int kTensors = 2;  // dy, x
  static constexpr int kChannels = Cursor::kChannels;

  using Formula = GradInput<acc_t>;

  Formula formula[kChannels];
  acc_t mean[kChannels];

  struct Parameters {
    acc_t weight, mean, invstd;
  };
  __device__ __forceinline__ static Parameters load_parameters(const Params& p, int64_t channel) {
    return {load_param_or<scalar_t>(p.weight, channel, acc_t(1)), load_global(p.mean + channel),
            load_global(p.invstd + channel)};
  }

  __device__ __forceinline__ static const scalar_t* tensor(const Params& p, int k) {
    return k == 0 ? p.grad_output : p.input;
  }
  __device__ __forceinline__ static scalar_t* output(const Params& p) { return p.grad_input; }

  __device__ __forceinline__ TeamBackward(const Params& p, const Cursor& cursor) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      mean[c] = cursor.channel_valid(c) ? load_global(p.mean + cursor.channel(c)) : acc_t(0);
    }
  }

  template <Batched kBatched, int kBatch>
  __device__ __forceinline__ void accumulate(
      Acc (&acc)[kChannels], const Vec<scalar_t> (&vec)[kTensors][kBatch],
      const Window<typename Cursor::index_t> (&)[kBatch]) const {
    add_gradients<Cursor>(acc, vec[0], vec[1], mean);
  }

  __device__ __forceinline__ static Formula finish(const Params& p, const Parameters& parameters,
                                                   const Acc& total, int64_t channel, bool owner) {
    const acc_t sum_dy_xhat = total.sum_dy_xhat * parameters.invstd;
    if (owner) {
      if (p.grad_weight.data) store_param<scalar_t>(p.grad_weight, channel, sum_dy_xhat);
      if (p.grad_bias.data) store_param<scalar_t>(p.grad_bias, channel, total.sum_dy);
    }
    if (!p.training) return {parameters.weight * parameters.invstd};
    return make_grad_input<acc_t>(parameters.weight, parameters.mean, parameters.invstd,
                                  total.sum_dy, sum_dy_xhat, static_cast<acc_t>(p.count));
  }

  __device__ __forceinline__ Pair<acc_t> form(const Vec<scalar_t> (&vec)[kTensors], int l) const {
    return grad_input(formula[Cursor::channel_of(l)], formula[Cursor::channel_of(l + 1)], vec[0],
                      vec[1], l);
  }
};

}  // namespace batchnorm_cuda
