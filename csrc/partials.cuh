// Partial results in the workspace: each block leaves one accumulator per channel of its split, and
// the merge kernel (merge.cuh) folds the rows in order.
#pragma once

#include "params.h"
#include "reduce.cuh"

namespace batchnorm_cuda {

template <typename acc_t, typename Cursor, typename Acc, int kChannels>
__device__ __forceinline__ void store_partials(const Partials<acc_t>& partials,
                                               const Cursor& cursor, Acc (&acc)[kChannels]) {
  const int64_t plane = partials.rows * partials.c;
#pragma unroll
  for (int f = 0; f < Acc::kFields; ++f) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      store_global(partials.data + f * plane + cursor.partial_index(c), acc[c].field(f));
    }
  }
}

template <typename acc_t, typename Acc>
__device__ __forceinline__ void store_partial(const Partials<acc_t>& partials, int64_t index,
                                              Acc& acc) {
  const int64_t plane = partials.rows * partials.c;
#pragma unroll
  for (int f = 0; f < Acc::kFields; ++f) {
    store_global(partials.data + f * plane + index, acc.field(f));
  }
}

template <typename Acc, typename acc_t>
__device__ __forceinline__ Acc load_partial(const Partials<acc_t>& partials, int64_t index) {
  const int64_t plane = partials.rows * partials.c;
  Acc acc;
#pragma unroll
  for (int f = 0; f < Acc::kFields; ++f) {
    acc.field(f) = load_global(partials.data + f * plane + index);
  }
  return acc;
}

}  // namespace batchnorm_cuda
