// Which part of which channel block a thread block works on (geometry.h, Traversal).
#pragma once

#include "platform.cuh"

namespace batchnorm_cuda {

// Units [first, end) of a channel block, the `row`th of its parts.
struct Part {
  int64_t channel_block, first, end;
  int row;
};

// That of a rank of a team.
__device__ __forceinline__ Part part_of_rank(const Traversal& t, int rank, int64_t channel_block) {
  const int64_t first = rank * t.per_split;
  return {channel_block, first, min_of(first + t.per_split, t.work), rank};
}

// The parts of a block of a stage kernel, from the first or from the last one on.
class Stretch {
 public:
  __device__ __forceinline__ Stretch(const Traversal& t, int64_t block)
      : t_(t), block_(block), first_(begin_of(block)), end_(begin_of(block + 1)) {}

  __device__ __forceinline__ bool any() const { return first_ < end_; }

  __device__ __forceinline__ Part take() {
    const int64_t channel_block = first_ / t_.work, begin = channel_block * t_.work;
    const int64_t end = min_of(end_, begin + t_.work);
    const Part part = make(channel_block, begin, first_, end);
    first_ = end;
    return part;
  }
  __device__ __forceinline__ Part take_back() {
    const int64_t channel_block = (end_ - 1) / t_.work, begin = channel_block * t_.work;
    const int64_t first = begin > first_ ? begin : first_;
    const Part part = make(channel_block, begin, first, end_);
    end_ = first;
    return part;
  }

 private:
  // The first unit of a block's stretch: block * units / grid, rounded down.
  __device__ __forceinline__ int64_t begin_of(int64_t block) const {
    return block * t_.per_split + block * t_.spare / t_.grid;
  }
  __device__ __forceinline__ Part make(int64_t channel_block, int64_t begin, int64_t first,
                                       int64_t end) const {
    int64_t row = 0;
    if (first > begin) {  // the first of the channel block's stretches is the one that begins there
      int64_t before = channel_block * t_.grid / t_.channel_blocks;
      if (begin_of(before + 1) <= begin) ++before;
      row = block_ - before;
    }
    return {channel_block, first - begin, end - begin, static_cast<int>(row)};
  }

  const Traversal& t_;
  const int64_t block_;
  int64_t first_, end_;  // of what is left, counted through all channel blocks
};

}  // namespace batchnorm_cuda
