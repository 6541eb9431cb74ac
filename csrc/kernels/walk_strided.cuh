// Walks in equal steps, along C and along rows: every lane of a thread has a channel of its own
// (traversal.cuh).
#pragma once

#include "../geometry.h"
#include "parts.cuh"
#include "vec_io.cuh"

namespace batchnorm_cuda {

// A walk in equal steps, with a channel a lane: what the walks along C and along rows share. `Self`
// says by current() which lanes of the window at offset_ are its own.
template <typename Self, typename scalar, typename index>
struct Strided {
  using scalar_t = scalar;
  using index_t = index;
  static constexpr Lanes kLanes = Lanes::kAll;
  static constexpr int kVecSize = kVec<scalar_t>;
  static constexpr int kChannels = kVecSize;
  __device__ __forceinline__ static constexpr int channel_of(int lane) { return lane; }

  index_t left = 0;

  __device__ __forceinline__ Window<index_t> take() {
    const Window<index_t> window = self().current();
    offset_ += step_;
    --left;
    return window;
  }

  // The window before the next one: undoes a take().
  __device__ __forceinline__ Window<index_t> take_back() {
    offset_ -= step_;
    ++left;
    return self().current();
  }

  // See AlongS.
  __device__ __forceinline__ index_t seek_end(const Part&) {
    const index_t windows = left;
    offset_ += windows * step_;
    left = 0;
    return windows;
  }
  __device__ __forceinline__ void forget() { forget_derived(offset_); }

 protected:
  index_t offset_ = 0, step_ = 0;

 private:
  __device__ __forceinline__ const Self& self() const { return static_cast<const Self&>(*this); }
};

// Along C: threadIdx.x is a window column of the row group, whose lanes are fixed channels;
// threadIdx.y walks over the row groups. A row group is row_repeat rows of C, a multiple of a
// window. Edges are the windows in which the tensor itself begins or ends.
template <typename scalar, typename index, bool exact>
struct AlongC : Strided<AlongC<scalar, index, exact>, scalar, index> {
  using Walk = Strided<AlongC, scalar, index>;
  using typename Walk::index_t;
  using Walk::kVecSize;
  static constexpr bool kExact = exact;
  static constexpr bool kEdges = !exact;
  static constexpr Pattern kPattern = Pattern::kAlongC;

  using Walk::left;

  __device__ __forceinline__ AlongC(const Traversal& t, const Part& part) : t_(t), part_(part) {
    column_ = static_cast<index_t>(part.channel_block * blockDim.x + threadIdx.x);
    begin();
    if (kExact || left == 0) return;
    const bool head = offset_ < 0;
    const bool tail = last_begin() + kVecSize > t.numel;
    if (head) offset_ += step_;
    left = left > index_t{head} + tail ? left - head - tail : 0;
  }

  class Edges {
   public:
    __device__ __forceinline__ explicit Edges(AlongC cursor) {
      cursor.begin();
      if (cursor.left == 0) return;
      const index_t last = cursor.last_begin();
      if (cursor.offset_ < 0) add(cursor.offset_, cursor.t_.numel);
      if (last + kVecSize > cursor.t_.numel && !(count_ > 0 && cursor.left == 1)) {
        add(last, cursor.t_.numel);
      }
    }
    __device__ __forceinline__ bool any() const { return count_ > 0; }
    __device__ __forceinline__ Window<index_t> take() {
      const Window<index_t> window = first_;
      first_ = next_;
      --count_;
      return window;
    }

   private:
    __device__ __forceinline__ void add(index_t offset, int64_t numel) {
      const int64_t until = min_of(numel - offset, kVecSize);
      // What was added before stands behind it: an index would take local memory.
      next_ = first_;
      first_ = {offset, offset < 0 ? static_cast<int>(-offset) : 0,
                until > 0 ? static_cast<int>(until) : 0};
      ++count_;
    }

    Window<index_t> first_ = {}, next_ = {};
    int count_ = 0;
  };
  __device__ __forceinline__ Edges edges() const { return Edges(*this); }

  // The threads that share a channel, and this one among them.
  __device__ __forceinline__ static int member() { return threadIdx.y; }
  __device__ __forceinline__ static int members() { return blockDim.y; }

  __device__ __forceinline__ bool channel_valid(int) const { return column_ < t_.row_windows; }
  __device__ __forceinline__ int64_t channel(int lane) const {
    const int64_t position = int64_t{column_} * kVecSize + lane;
    if (kExact) return position;
    const int64_t channel = (position - t_.shift) % t_.c;
    return channel < 0 ? channel + t_.c : channel;
  }
  __device__ __forceinline__ int64_t partial_index(int lane) const {
    return (int64_t{part_.row} * t_.row_windows + column_) * kVecSize + lane;
  }
  // Of the lanes of a row group that hold a channel, the first one owns it.
  __device__ __forceinline__ bool owns_channel(int lane) const {
    return part_.row == 0 && member() == 0 && channel_valid(lane) &&
           int64_t{column_} * kVecSize + lane < t_.c;
  }

  __device__ __forceinline__ Window<index_t> current() const { return {offset_, 0, kVecSize}; }

  // Of a team: the channels of a block, the first of them, and that of a lane among them.
  __device__ __forceinline__ static int channels(const Traversal&) { return blockDim.x * kVecSize; }
  __device__ __forceinline__ static int64_t first_channel(const Traversal&, index_t channel_block) {
    return int64_t{channel_block} * blockDim.x * kVecSize;
  }
  __device__ __forceinline__ int channel_of_block(int lane) const {
    return threadIdx.x * kVecSize + lane;
  }

 protected:
  // At the first of all windows, edges too.
  __device__ __forceinline__ void begin() {
    const int64_t first = part_.first + threadIdx.y;
    left = 0;
    if (column_ >= t_.row_windows || first >= part_.end) return;
    left = static_cast<index_t>((part_.end - first + blockDim.y - 1) / blockDim.y);
    offset_ = static_cast<index_t>((first * t_.row_windows + column_) * kVecSize - t_.shift);
    step_ = static_cast<index_t>(blockDim.y * t_.row_windows * kVecSize);
  }
  __device__ __forceinline__ index_t last_begin() const { return offset_ + (left - 1) * step_; }

  const Traversal& t_;
  const Part part_;
  index_t column_;

  using Walk::offset_;
  using Walk::step_;
};

// Along a row: columns as along C, but several of them are one channel (geometry.h). For runs too
// short or too odd for whole windows along S, and for channels-last rows that are no whole windows:
// a row of all channels, or a few rows together, always is. Edges, where the tensor is no whole
// number of rows, are for elementwise kernels.
template <typename scalar, typename index, bool exact = true>
struct AlongRow : AlongC<scalar, index, exact> {
  using Base = AlongC<scalar, index, exact>;
  static constexpr Pattern kPattern = Pattern::kAlongRow;

  using Base::Base;

  // Where the block's channels begin among its columns, in sample j of the row.
  __device__ __forceinline__ int first_column(int j) const {
    return j * static_cast<int>(this->t_.segments * this->t_.s);
  }

  // See AlongC.
  __device__ __forceinline__ static int channels(const Traversal& t) {
    return static_cast<int>(t.segments);
  }
  __device__ __forceinline__ static int64_t first_channel(const Traversal& t, index channel_block) {
    const auto position = static_cast<unsigned_t>(Base::first_channel(t, channel_block));
    return position / static_cast<unsigned_t>(t.s) % static_cast<unsigned_t>(t.c);
  }
  __device__ __forceinline__ int channel_of_block(int lane) const {
    return Base::channel_of_block(lane) / static_cast<int>(this->t_.s) %
           static_cast<int>(this->t_.segments);
  }
  __device__ __forceinline__ int64_t channel(int lane) const {
    return static_cast<unsigned_t>(position(lane)) / s() % static_cast<unsigned_t>(this->t_.c);
  }
  // Of the columns that hold a channel, the first one owns it.
  __device__ __forceinline__ bool owns_channel(int lane) const {
    const Traversal& t = this->t_;
    const bool first =
        position(lane) < t.c * t.s && static_cast<unsigned_t>(position(lane)) % s() == 0;
    return this->part_.row == 0 && Base::member() == 0 && this->channel_valid(lane) && first;
  }

 private:
  // Divisions are of as many bits as indices: of 64 each would take a hundred instructions.
  using unsigned_t = std::make_unsigned_t<index>;
  __device__ __forceinline__ unsigned_t s() const { return static_cast<unsigned_t>(this->t_.s); }
  // Of a lane in its row.
  __device__ __forceinline__ int64_t position(int lane) const {
    return int64_t{this->column_} * Base::kVecSize + lane;
  }
};

// Along a row, in teams: a channel block is `segments` whole channels of a sample, threadIdx.x a
// window of it, threadIdx.y walks over the samples. Those that a thread takes start at the same
// place in a window, so that its lanes keep their channels. The first and the last window of a
// block have lanes that are not the block's. An edge is the window in which the tensor ends.
template <typename scalar, typename index>
struct AlongSamples : Strided<AlongSamples<scalar, index>, scalar, index> {
  using Walk = Strided<AlongSamples, scalar, index>;
  using typename Walk::index_t;
  using Walk::kVecSize;
  using Walk::left;
  static constexpr bool kExact = false;
  static constexpr bool kEdges = true;
  static constexpr Lanes kLanes = Lanes::kKept;
  static constexpr Pattern kPattern = Pattern::kAlongRow;

  __device__ __forceinline__ AlongSamples(const Traversal& t, const Part& part)
      : t_(t), row_(part.row), first_(part.channel_block * t.segments) {
    const int64_t sample = part.first * t.row_repeat + threadIdx.y;
    const int64_t end = min_of(part.end * t.row_repeat, t.n);
    const int64_t run = min_of(t.segments, t.c - first_) * t.s;
    const int before = window_start(sample) - threadIdx.x * kVecSize;  // of the first channel
    lo_ = before > 0 ? before : 0;
    hi_ = static_cast<int>(min_of(before + run, kVecSize));
    offset_ = static_cast<index_t>((sample * t.c + first_) * t.s - before);
    step_ = static_cast<index_t>(blockDim.y * t.c * t.s);
    if (lo_ >= hi_ || sample >= end) return;
    left = static_cast<index_t>((end - sample + blockDim.y - 1) / blockDim.y);
    tail_ = last_begin() + kVecSize > t.numel;
    left -= tail_;
  }

  class Edges {
   public:
    __device__ __forceinline__ explicit Edges(const AlongSamples& cursor)
        : window_(cursor.tail()), any_(cursor.tail_) {}
    __device__ __forceinline__ bool any() const { return any_; }
    __device__ __forceinline__ Window<index_t> take() {
      any_ = false;
      return window_;
    }

   private:
    Window<index_t> window_;
    bool any_;
  };
  __device__ __forceinline__ Edges edges() const { return Edges(*this); }

  __device__ __forceinline__ Window<index_t> current() const { return {offset_, lo_, hi_}; }

  __device__ __forceinline__ bool channel_valid(int lane) const {
    return lane >= lo_ && lane < hi_;
  }
  __device__ __forceinline__ int64_t channel(int lane) const {
    return first_ + channel_of_block(lane);
  }

  // See AlongRow; sample j is threadIdx.y == j.
  __device__ __forceinline__ static int channels(const Traversal& t) {
    return static_cast<int>(t.segments);
  }
  __device__ __forceinline__ static int64_t first_channel(const Traversal& t, index channel_block) {
    return channel_block * t.segments;
  }
  __device__ __forceinline__ int channel_of_block(int lane) const {
    return channel_valid(lane) ? place(lane) / static_cast<int>(t_.s) : 0;
  }
  __device__ __forceinline__ int first_column(int j) const {
    return j * blockDim.x * kVecSize + window_start(j);
  }

 private:
  __device__ __forceinline__ index_t last_begin() const { return offset_ + (left - 1) * step_; }
  // Behind the windows that are left.
  __device__ __forceinline__ Window<index_t> tail() const {
    return {offset_ + left * step_, lo_, hi_};
  }
  // Where the block's channels begin in a window, in this sample.
  __device__ __forceinline__ int window_start(int64_t sample) const {
    return static_cast<int>((sample * t_.c + first_) * t_.s & (kVecSize - 1));
  }
  // Of a lane among the block's elements of a sample.
  __device__ __forceinline__ int place(int lane) const {
    return threadIdx.x * kVecSize + lane - window_start(threadIdx.y);
  }

  const Traversal& t_;
  int row_;
  int64_t first_;  // channel
  int lo_, hi_;
  bool tail_ = false;  // there is an edge

  using Walk::offset_;
  using Walk::step_;
};

}  // namespace batchnorm_cuda
