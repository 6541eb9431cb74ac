// Partial results in the workspace: for each of its parts a block leaves one accumulator per
// channel, and the merge kernel (merge.cuh) folds the rows in order.
#pragma once

#include "../params.h"
#include "parts.cuh"
#include "reduce.cuh"

namespace batchnorm_cuda {

// `kCount` accumulators at index(i) of the part's row. Channel blocks may have different numbers of
// parts: the last one leaves empty results where others have one more.
template <int kCount, typename acc_t, typename Acc, typename Index>
__device__ __forceinline__ void store_row(const Partials<acc_t>& partials, const Traversal& t,
                                          const Part& part, int64_t row, Acc (&acc)[kCount],
                                          Index&& index) {
  const int64_t plane = partials.rows * partials.c;
  const int64_t empty = part.end == t.work ? t.splits - 1 - part.row : 0;
#pragma unroll 1
  for (int64_t i = 0; i <= empty; ++i) {
#pragma unroll
    for (int f = 0; f < Acc::kFields; ++f) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        store_global(partials.data + f * plane + i * row + index(c), acc[c].field(f));
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) acc[c] = Acc();
  }
}

// Of a part, from the threads whose member() is 0. Where the block has all columns of its channels
// they are merged first, so that the merge kernel reads a row a part and not row_repeat of them.
// Every thread of the block must call; a barrier ends the call where shared memory is used.
template <typename acc_t, typename Cursor, typename Acc, int kChannels>
__device__ __forceinline__ void store_partials(const Partials<acc_t>& partials, const Traversal& t,
                                               const Part& part, const Cursor& cursor,
                                               Acc (&acc)[kChannels], acc_t* shared) {
  const bool holds = Cursor::member() == 0 && cursor.channel_valid(0);
  if constexpr (kChannels > 1 && !Cursor::kExact) {
    if (t.folds) {
      const int columns = blockDim.x * kChannels, c = static_cast<int>(t.c);
      if (holds) {
#pragma unroll
        for (int i = 0; i < kChannels * Acc::kFields; ++i) {
          const int lane = i / Acc::kFields, f = i % Acc::kFields;
          store_shared(shared + f * columns + threadIdx.x * kChannels + lane, acc[lane].field(f));
        }
      }
      __syncthreads();
      const int threads = blockDim.x * blockDim.y;
      for (int k = threadIdx.y * blockDim.x + threadIdx.x; k < c; k += threads) {
        Acc merged[1];
#pragma unroll 1
        for (int column = k; column < columns; column += c) {
          Acc other;
#pragma unroll
          for (int f = 0; f < Acc::kFields; ++f) {
            other.field(f) = load_shared(shared + f * columns + column);
          }
          merged[0].merge(other);
          merged[0].rebase();
        }
        store_row(partials, t, part, t.c, merged, [&](int) { return int64_t{part.row} * t.c + k; });
      }
      __syncthreads();
      return;
    }
  }
  if (!holds) return;
  store_row(partials, t, part, t.row_repeat * t.c, acc,
            [&](int c) { return cursor.partial_index(c); });
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
