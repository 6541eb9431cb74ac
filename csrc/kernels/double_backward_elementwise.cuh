// The elementwise half of the double backward, both of its large outputs in one pass over dy, ggx
// (the gradient of grad_input) and x: the gradients of dy and of x, as formulas.cuh has them. In
// eval mode the statistics are constants, so that the gradient of x needs dy alone. A tensor that
// takes no part is not read, an output that is not wanted not written.
#pragma once

#include "formulas.cuh"
#include "launch.cuh"
#include "partials.cuh"

namespace batchnorm_cuda {

template <typename Cursor, typename Params>
__device__ __forceinline__ auto load_double_gradient(const Params& p, const Cursor& cursor,
                                                     int lane) {
  using acc_t = typename Params::acc_t;
  if (!cursor.channel_valid(lane)) return DoubleGrad<acc_t>{};
  const int64_t c = cursor.channel(lane);
  const acc_t weight = load_param_or<typename Cursor::scalar_t>(p.weight, c, acc_t(1));
  const acc_t mean = load_global(p.mean + c), invstd = load_global(p.invstd + c);
  const acc_t ggw = load_param_or<typename Cursor::scalar_t>(p.grad_grad_weight, c, acc_t(0));
  const acc_t ggb = load_param_or<typename Cursor::scalar_t>(p.grad_grad_bias, c, acc_t(0));
  if (!p.training) return make_double_grad_eval(weight, mean, invstd, ggw, ggb);
  DoubleGradSums<acc_t> sums;
  if (p.sums.data) sums = load_partial<DoubleGradSums<acc_t>>(p.sums, c);
  return make_double_grad(weight, mean, invstd, ggw, ggb, sums, static_cast<acc_t>(p.count));
}

// The three windows at one position.
template <typename scalar_t>
struct DoubleBackwardInputs {
  Vec<scalar_t> dy, ggx, x;
};

template <Lanes kLanes, bool kExact, typename scalar_t, typename index_t>
__device__ __forceinline__ DoubleBackwardInputs<scalar_t> load_inputs(
    const DoubleBackwardElementwiseParams<scalar_t>& p, const Window<index_t>& window) {
  const int64_t numel = p.traversal.numel;
  return {
      load_window_or_zero<kLanes>(p.grad_output, window, numel, kExact || p.grad_output_aligned),
      load_window_or_zero<kLanes>(p.grad_grad_input, window, numel,
                                  kExact || p.grad_grad_input_aligned),
      load_window_or_zero<kLanes>(p.input, window, numel, kExact || p.input_aligned)};
}

template <Lanes kLanes, typename scalar_t, typename index_t, int kChannels>
__device__ __forceinline__ void store_double_gradients(
    const DoubleBackwardElementwiseParams<scalar_t>& p, const Window<index_t>& window,
    const DoubleBackwardInputs<scalar_t>& in,
    const DoubleGrad<acc_type<scalar_t>> (&channel)[kChannels]) {
  constexpr int kVecSize = kVec<scalar_t>;
  acc_type<scalar_t> ddy[kVecSize], dx[kVecSize];
#pragma unroll
  for (int l = 0; l < kVecSize; ++l) {
    const auto& formula = channel[l * kChannels / kVecSize];
    const auto dy = to_acc(in.dy.lane[l]), ggx = to_acc(in.ggx.lane[l]), x = to_acc(in.x.lane[l]);
    ddy[l] = formula.grad_grad_output(ggx, x);
    dx[l] = p.training ? formula.grad_input(dy, ggx, x) : formula.grad_input(dy);
  }
  if (p.grad_grad_output) {
    store_window<kLanes>(p.grad_grad_output, window, round_to<scalar_t>(ddy));
  }
  if (p.grad_input) store_window<kLanes>(p.grad_input, window, round_to<scalar_t>(dx));
}

template <typename Cursor>
__global__ void __launch_bounds__(kStageThreads, kStageBlocksPerSm)
    double_backward_elementwise_kernel(
        const DoubleBackwardElementwiseParams<typename Cursor::scalar_t> p) {
  using scalar_t = typename Cursor::scalar_t;
  constexpr bool kExact = Cursor::kExact;
  // Along C, seven constants for every lane leave registers for the three windows of one position.
  constexpr int kUnrollTriples = Cursor::kChannels == 1 ? 2 : 1;
  // Forwards: backwards, the compiler splits the accesses of the one position in flight along C.
  for (Stretch stretch(p.traversal, blockIdx.x); stretch.any();) {
    const Part part = stretch.take();
    Cursor cursor(p.traversal, part);
    DoubleGrad<acc_type<scalar_t>> channel[Cursor::kChannels];
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) {
      channel[c] = load_double_gradient(p, cursor, c);
    }
    while (cursor.left > 0) {
      Window<typename Cursor::index_t> windows[kUnrollTriples];
      DoubleBackwardInputs<scalar_t> inputs[kUnrollTriples];
#pragma unroll
      for (int u = 0; u < kUnrollTriples; ++u) {
        windows[u] = {0, 0, 0};
        if (cursor.left > 0) windows[u] = cursor.take();
        inputs[u] = load_inputs<Cursor::kLanes, kExact>(p, windows[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnrollTriples; ++u) {
        store_double_gradients<Cursor::kLanes>(p, windows[u], inputs[u], channel);
      }
    }
    for_each_edge(cursor, [&](const Window<typename Cursor::index_t>& edge) {
      const auto inputs = load_inputs<Lanes::kMasked, kExact>(p, edge);
      store_double_gradients<Lanes::kMasked>(p, edge, inputs, channel);
    });
  }
}

// ---------------------------------------------------------------------------- launchers

template <typename scalar_t>
LaunchStatus launch_double_backward_elementwise(
    Pattern pattern, const DoubleBackwardElementwiseParams<scalar_t>& params, cudaStream_t stream) {
  const Traversal& t = params.traversal;
  return with_elementwise_cursor<scalar_t>(pattern, t, [&](auto tag) {
    using Cursor = typename decltype(tag)::type;
    return launch_kernel(double_backward_elementwise_kernel<Cursor>, t.grid, block_of(t), 0, stream,
                         params);
  });
}

}  // namespace batchnorm_cuda
