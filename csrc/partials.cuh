// Partial results in the workspace: for each of its parts a block leaves one accumulator per
// channel, and the merge kernel (merge.cuh) folds the rows in order.
#pragma once

#include "params.h"
#include "parts.cuh"
#include "reduce.cuh"

namespace batchnorm_cuda {

// Of a part. Channel blocks may have different numbers of parts: the last one leaves empty results
// where others have one more.
template <typename acc_t, typename Cursor, typename Acc, int kChannels>
__device__ __forceinline__ void store_partials(const Partials<acc_t>& partials, const Traversal& t,
                                               const Part& part, const Cursor& cursor,
                                               Acc (&acc)[kChannels]) {
  const int64_t plane = partials.rows * partials.c, row = t.row_repeat * t.c;
  const int64_t empty = part.end == t.work ? t.splits - 1 - part.row : 0;
#pragma unroll 1
  for (int64_t i = 0; i <= empty; ++i) {
#pragma unroll
    for (int f = 0; f < Acc::kFields; ++f) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int64_t index = cursor.partial_index(c) + i * row;
        store_global(partials.data + f * plane + index, acc[c].field(f));
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) acc[c] = Acc();
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
