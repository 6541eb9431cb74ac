// Reductions: the accumulators and the one fixed-order tree that merges them, over a warp, a block
// and the partial results of many blocks. The order depends on the plan only, so results repeat to
// the bit.
#pragma once

#include "../geometry.h"
#include "pair.cuh"

namespace batchnorm_cuda {

// How much the two sides of a merge weigh: n = n_a + n_b, n_b / n and n_a * n_b / n.
template <typename acc_t>
struct MergeWeights {
  acc_t total, fraction, product;
  bool first;  // n_a is 0

  __device__ __forceinline__ MergeWeights(acc_t count, acc_t other)
      : total(count + other),
        fraction(batchnorm_cuda::product(other, reciprocal(total > 0 ? total : acc_t(1)))),
        product(batchnorm_cuda::product(count, fraction)),
        first(count == 0) {}
};

// Mean and M2 = sum of (x - mean)^2 of a set of values, or of two sets where value_t is a pair. Two
// sets merge by Chan, Golub and LeVeque (1983): with delta = mean_b - mean_a and n = n_a + n_b,
//   mean = mean_a + delta * n_b / n        M2 = M2_a + M2_b + delta^2 * n_a * n_b / n,
// associated so that an empty side contributes 0 even where delta^2 would overflow.
template <typename value_t>
struct Moments {
  value_t mean, m2;

  __device__ __forceinline__ void merge(const value_t& delta, const value_t& other_m2,
                                        const value_t& fraction, const value_t& product) {
    m2 = m2 + fused_multiply_add(delta, delta * product, other_m2);
    mean = fused_multiply_add(delta, fraction, mean);
  }
};

// Count and moments. The mean is kept as shift + mean, shift being the first batch's rounded mean:
// what is added up is then of the size of the spread, not of the mean, and |mean| >> std costs no
// digits.
template <typename acc_t>
struct Welford {
  static constexpr int kFields = 4;
  static constexpr int kCommon = 1;  // leading fields that all channels of an exact tiling share
  acc_t count = 0, shift = 0, mean = 0, m2 = 0;

  __device__ __forceinline__ acc_t& field(int i) {
    return i == 0 ? count : i == 1 ? shift : i == 2 ? mean : m2;
  }

  __device__ __forceinline__ void merge(const Welford& other) {
    const MergeWeights<acc_t> weights(count, other.count);
    begin(other.shift, weights);
    Moments<acc_t> merged{mean, m2};
    merged.merge((other.shift - shift) + (other.mean - mean), other.m2, weights.fraction,
                 weights.product);
    end(merged.mean, merged.m2, weights);
  }

  __device__ __forceinline__ void take_common(const Welford& other) { count = other.count; }

  // The steps of merge() that pairs of channels take one by one.
  __device__ __forceinline__ void begin(acc_t other_shift, const MergeWeights<acc_t>& weights) {
    if (weights.first) shift = other_shift;
  }
  __device__ __forceinline__ void end(acc_t merged_mean, acc_t merged_m2,
                                      const MergeWeights<acc_t>& weights) {
    mean = merged_mean;
    m2 = merged_m2;
    count = weights.total;
  }

  // Moves what the sum shift + mean can hold into the shift, and leaves the rest, which is exact
  // (Knuth's two-sum). The first batch's mean may be far off the others', an outlier's, and the
  // mean would be of that size from then on, and round at it.
  __device__ __forceinline__ void rebase() {
    const acc_t sum = shift + mean;
    const acc_t from_mean = sum - shift;
    mean = (shift - (sum - from_mean)) + (mean - from_mean);
    shift = sum;
  }
};

// The two sums of the backward pass, of one channel, or of two where value_t is a pair. Until a
// channel is finished sum_dy_xhat is that of dy * (x - mean): backward_reduce_kernel and
// TeamBackward::finish multiply by invstd, once a channel.
template <typename value_t>
struct GradSums {
  static constexpr int kFields = 2;
  static constexpr int kCommon = 0;
  value_t sum_dy = {}, sum_dy_xhat = {};

  __device__ __forceinline__ value_t& field(int i) { return i == 0 ? sum_dy : sum_dy_xhat; }

  __device__ __forceinline__ void add(const value_t& dy, const value_t& centred) {
    sum_dy = sum_dy + dy;
    sum_dy_xhat = fused_multiply_add(dy, centred, sum_dy_xhat);
  }
  __device__ __forceinline__ void merge(const GradSums& other) {
    sum_dy = sum_dy + other.sum_dy;
    sum_dy_xhat = sum_dy_xhat + other.sum_dy_xhat;
  }

  __device__ __forceinline__ void rebase() {}
  __device__ __forceinline__ void take_common(const GradSums&) {}
};

// The sums of the double backward: those of GradSums, the same two of the gradient of grad_input
// (ggx), and Σ ggx·dy.
template <typename value_t>
struct DoubleGradSums {
  static constexpr int kFields = 5;
  static constexpr int kCommon = 0;
  value_t sum_dy = {}, sum_dy_xhat = {}, sum_ggx = {}, sum_ggx_xhat = {}, sum_ggx_dy = {};

  __device__ __forceinline__ value_t& field(int i) {
    return i == 0   ? sum_dy
           : i == 1 ? sum_dy_xhat
           : i == 2 ? sum_ggx
           : i == 3 ? sum_ggx_xhat
                    : sum_ggx_dy;
  }

  __device__ __forceinline__ void add(const value_t& dy, const value_t& ggx,
                                      const value_t& centred) {
    sum_dy = sum_dy + dy;
    sum_dy_xhat = fused_multiply_add(dy, centred, sum_dy_xhat);
    sum_ggx = sum_ggx + ggx;
    sum_ggx_xhat = fused_multiply_add(ggx, centred, sum_ggx_xhat);
    sum_ggx_dy = fused_multiply_add(ggx, dy, sum_ggx_dy);
  }
  __device__ __forceinline__ void merge(DoubleGradSums other) {
#pragma unroll
    for (int f = 0; f < kFields; ++f) field(f) = field(f) + other.field(f);
  }

  __device__ __forceinline__ void rebase() {}
  __device__ __forceinline__ void take_common(const DoubleGradSums&) {}
};

template <typename Acc>
__device__ __forceinline__ Acc shuffle_down(Acc acc, int offset, int width) {
#pragma unroll
  for (int f = 0; f < Acc::kFields; ++f) {
    acc.field(f) = __shfl_down_sync(0xffffffffu, acc.field(f), offset, width);
  }
  return acc;
}

// Merges the accumulators of `group` consecutive threads (a power of two dividing the block).
// Every thread of the block must call, the block is whole warps; `shared` holds one accumulator a
// warp, field by field. Every thread gets its group's result; a barrier ends the call where shared
// memory was used, so that it may be called again.
template <typename Acc, typename acc_t>
__device__ __forceinline__ Acc group_reduce(Acc acc, int group, acc_t* shared) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int width = group < kWarpSize ? group : kWarpSize;
#pragma unroll 1
  for (int offset = width / 2; offset > 0; offset /= 2) {
    acc.merge(shuffle_down(acc, offset, width));
    acc.rebase();
  }
  if (group > kWarpSize) {
    const int warps = blockDim.x * blockDim.y / kWarpSize;
    const int first = thread / group * (group / kWarpSize);  // the group's first warp
    if (thread % kWarpSize == 0) {
#pragma unroll
      for (int f = 0; f < Acc::kFields; ++f) {
        store_shared(shared + f * warps + thread / kWarpSize, acc.field(f));
      }
    }
    __syncthreads();
    acc = Acc();
#pragma unroll 1
    for (int warp = first; warp < first + group / kWarpSize; ++warp) {
      Acc other;
#pragma unroll
      for (int f = 0; f < Acc::kFields; ++f) {
        other.field(f) = load_shared(shared + f * warps + warp);
      }
      acc.merge(other);
      acc.rebase();
    }
    __syncthreads();
  } else {
#pragma unroll
    for (int f = 0; f < Acc::kFields; ++f) {
      acc.field(f) = __shfl_sync(0xffffffffu, acc.field(f), 0, width);
    }
  }
  return acc;
}

// Merges kLanes accumulators of a thread with those that value(l, f) gives. kExact: the lanes'
// common fields are the same, which saves registers and reciprocals.
template <bool kExact, int kLanes, typename Acc, typename Value>
__device__ __forceinline__ void merge_lanes(Acc (&acc)[kLanes], Value&& value) {
  const Acc mine = acc[0];
  Acc first;
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
    Acc other = first;
    if (kExact) acc[l].take_common(mine);
#pragma unroll
    for (int f = kExact && l > 0 ? Acc::kCommon : 0; f < Acc::kFields; ++f) {
      other.field(f) = value(l, f);
    }
    if (l == 0) first = other;
    acc[l].merge(other);
  }
}

// Merges kLanes accumulators per thread over threadIdx.y, for every threadIdx.x on its own. Every
// thread of the block must call; `shared` is column_scratch_values(...) of geometry.h long. The
// result is in the threads with threadIdx.y == 0; a barrier ends the call. Where whole rows fit a
// warp, shuffles merge the warp's rows first: less shared memory and fewer barriers. `keep`, a
// divisor of blockDim.y: only every keep-th row is merged, and the results are in the first `keep`
// rows.
template <bool kExact, int kLanes, typename Acc, typename acc_t>
__device__ __forceinline__ void column_reduce(Acc (&acc)[kLanes], acc_t* shared, int keep = 1) {
  const int columns = blockDim.x;
  const int warp_rows = keep > 1 ? 1 : rows_merged_by_shuffles(blockDim.x, blockDim.y);
#pragma unroll 1
  for (int offset = warp_rows * columns / 2; offset >= columns; offset /= 2) {
    merge_lanes<kExact>(acc, [&](int l, int f) {
      return __shfl_down_sync(0xffffffffu, acc[l].field(f), offset, kWarpSize);
    });
#pragma unroll
    for (int l = 0; l < kLanes; ++l) acc[l].rebase();
  }
  const bool holds = threadIdx.y % warp_rows == 0;
  const int row = threadIdx.y / warp_rows;
  int rows = blockDim.y / warp_rows;
  const int plane = rows * columns;
  const int mine = row * columns + threadIdx.x;
#pragma unroll 1
  while (rows > keep) {
    const int half = (rows / keep + 1) / 2 * keep;
    if (holds && row >= half && row < rows) {
#pragma unroll
      for (int i = 0; i < kLanes * Acc::kFields; ++i) {
        store_shared(shared + i * plane + mine, acc[i / Acc::kFields].field(i % Acc::kFields));
      }
    }
    __syncthreads();
    if (holds && row + half < rows) {
      merge_lanes<kExact>(acc, [&](int l, int f) {
        return load_shared(shared + (l * Acc::kFields + f) * plane + mine + half * columns);
      });
#pragma unroll
      for (int l = 0; l < kLanes; ++l) acc[l].rebase();
    }
    rows = half;
  }
  __syncthreads();
}

}  // namespace batchnorm_cuda
