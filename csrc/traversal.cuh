// How a thread walks over its windows of the tensor, for the two access patterns of plan.h. A
// cursor is made per task, or per split and channel block; `left` windows remain, take() hands out
// the next one. No division per window.
#pragma once

#include "plan.h"
#include "vec_io.cuh"

namespace batchnorm_cuda {

__device__ __forceinline__ int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Along S: the block's threads_y groups take one channel each; the windows of a channel, N runs of
// row_windows, are numbered through, and a group's threads take every threads_x-th of them.
template <typename scalar, typename index, bool exact>
struct AlongS {
  using scalar_t = scalar;
  using index_t = index;
  static constexpr bool kExact = exact;
  static constexpr int kVecSize = kVec<scalar_t>;
  static constexpr Pattern kPattern = Pattern::kAlongS;
  static constexpr int kChannels = 1;  // channels per thread: all lanes are of the same one
  __device__ __forceinline__ static constexpr int channel_of(int) { return 0; }

  index_t left = 0;

  __device__ __forceinline__ AlongS(const Traversal& t, int64_t task)
      : AlongS(t, task / t.channel_blocks, task % t.channel_blocks) {}
  __device__ __forceinline__ AlongS(const Traversal& t, int64_t split, int64_t channel_block)
      : t_(t), split_(static_cast<int>(split)) {
    channel_ = static_cast<index_t>(channel_block * blockDim.y + threadIdx.y);
    const int64_t first = split * t.per_split + threadIdx.x;
    const int64_t end = min_of((split + 1) * t.per_split, t.rows * t.row_windows);
    if (!channel_valid(0) || first >= end) return;
    const int64_t step = blockDim.x;
    left = static_cast<index_t>((end - first + step - 1) / step);
    const int64_t run = first / t.row_windows;
    column_ = static_cast<index_t>(first - run * t.row_windows);
    run_start_ = static_cast<index_t>((run * t.c + channel_) * t.s);
    const int64_t step_runs = step / t.row_windows;
    step_columns_ = static_cast<index_t>(step - step_runs * t.row_windows);
    step_elements_ = static_cast<index_t>(step_runs * t.c * t.s);
  }

  __device__ __forceinline__ Window<index_t> take() {
    const Window<index_t> window = current();
    column_ += step_columns_;
    run_start_ += step_elements_;
    if (column_ >= static_cast<index_t>(t_.row_windows)) {
      column_ -= static_cast<index_t>(t_.row_windows);
      run_start_ += static_cast<index_t>(t_.c * t_.s);
    }
    --left;
    return window;
  }

  // The window before the next one: undoes a take().
  __device__ __forceinline__ Window<index_t> take_back() {
    column_ -= step_columns_;
    run_start_ -= step_elements_;
    if (column_ < 0) {
      column_ += static_cast<index_t>(t_.row_windows);
      run_start_ -= static_cast<index_t>(t_.c * t_.s);
    }
    ++left;
    return current();
  }

  // Goes behind the last window, for a walk by take_back(). Returns how many there are.
  __device__ __forceinline__ index_t seek_end() {
    const index_t windows = left;
    const int64_t end = int64_t{split_} * t_.per_split + threadIdx.x + int64_t{left} * blockDim.x;
    const int64_t run = end / t_.row_windows;
    column_ = static_cast<index_t>(end - run * t_.row_windows);
    run_start_ = static_cast<index_t>((run * t_.c + channel_) * t_.s);
    left = 0;
    return windows;
  }

  // To be called between two walks over the same windows: the offsets of the first are not kept in
  // registers for the second.
  __device__ __forceinline__ void forget() { forget_derived(run_start_); }

  // The threads that share a channel, and this one among them.
  __device__ __forceinline__ static int member() { return threadIdx.x; }
  __device__ __forceinline__ static int members() { return blockDim.x; }

  __device__ __forceinline__ bool channel_valid(int) const { return channel_ < t_.c; }
  __device__ __forceinline__ int64_t channel(int) const { return channel_; }
  // Where this thread's channel stands in a plane of partial results.
  __device__ __forceinline__ int64_t partial_index(int) const {
    return int64_t{split_} * t_.c + channel_;
  }
  // True in one thread per channel and kernel.
  __device__ __forceinline__ bool owns_channel(int) const {
    return split_ == 0 && member() == 0 && channel_valid(0);
  }

 protected:
  __device__ __forceinline__ Window<index_t> current() const {
    Window<index_t> window{run_start_ + column_ * kVecSize, 0, kVecSize};
    if (!kExact) {
      // Windows lie on the reference tensor's 16-byte boundaries: step back to the one before.
      window.offset -= (run_start_ + t_.shift) & (kVecSize - 1);
      const index_t before = run_start_ - window.offset;
      const index_t until = before + static_cast<index_t>(t_.s);
      window.lo = before > 0 ? static_cast<int>(before) : 0;
      window.hi = until < kVecSize ? static_cast<int>(until) : kVecSize;
    }
    return window;
  }

  const Traversal& t_;
  int split_;
  index_t channel_, column_ = 0, run_start_ = 0, step_columns_ = 0, step_elements_ = 0;
};

// Along S with 64-bit indices, of which every operation takes two instructions: the place of the
// next window is kept instead of its run's, and the columns behind it, whose sign tells a run's
// end.
template <typename scalar>
struct AlongFarS : AlongS<scalar, int64_t, true> {
  using Base = AlongS<scalar, int64_t, true>;

  __device__ __forceinline__ AlongFarS(const Traversal& t, int64_t task) : Base(t, task) {
    begin();
    step_ = this->step_elements_ + this->step_columns_ * Base::kVecSize;
    next_run_ = t.c * t.s - t.row_windows * Base::kVecSize;
  }

  __device__ __forceinline__ Window<int64_t> take() {
    const Window<int64_t> window{offset_, 0, Base::kVecSize};
    offset_ += step_;
    behind_ -= this->step_columns_;
    if (behind_ < 0) {
      behind_ += this->t_.row_windows;
      offset_ += next_run_;
    }
    --this->left;
    return window;
  }
  __device__ __forceinline__ Window<int64_t> take_back() {
    offset_ -= step_;
    behind_ += this->step_columns_;
    if (behind_ >= this->t_.row_windows) {
      behind_ -= this->t_.row_windows;
      offset_ -= next_run_;
    }
    ++this->left;
    return {offset_, 0, Base::kVecSize};
  }
  __device__ __forceinline__ int64_t seek_end() {
    const int64_t windows = Base::seek_end();
    begin();
    return windows;
  }

 private:
  __device__ __forceinline__ void begin() {
    offset_ = this->current().offset;
    behind_ = this->t_.row_windows - 1 - this->column_;
  }

  int64_t offset_, behind_, step_, next_run_;
};

// A walk in equal steps, with a channel a lane: what the walks along C and along rows share. `Self`
// says by current() which lanes of the window at offset_ are its own.
template <typename Self, typename scalar, typename index>
struct Strided {
  using scalar_t = scalar;
  using index_t = index;
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
  __device__ __forceinline__ index_t seek_end() {
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
// window.
template <typename scalar, typename index, bool exact>
struct AlongC : Strided<AlongC<scalar, index, exact>, scalar, index> {
  using Walk = Strided<AlongC, scalar, index>;
  using typename Walk::index_t;
  using Walk::kVecSize;
  static constexpr bool kExact = exact;
  static constexpr Pattern kPattern = Pattern::kAlongC;

  using Walk::left;

  __device__ __forceinline__ AlongC(const Traversal& t, int64_t task)
      : AlongC(t, task / t.channel_blocks, task % t.channel_blocks) {}
  __device__ __forceinline__ AlongC(const Traversal& t, int64_t split, int64_t channel_block)
      : t_(t), split_(static_cast<int>(split)) {
    column_ = static_cast<index_t>(channel_block * blockDim.x + threadIdx.x);
    const int64_t first = split * t.per_split + threadIdx.y;
    const int64_t end = min_of((split + 1) * t.per_split, t.rows);
    if (column_ >= t.row_windows || first >= end) return;
    left = static_cast<index_t>((end - first + blockDim.y - 1) / blockDim.y);
    offset_ = static_cast<index_t>((first * t.row_windows + column_) * kVecSize - t.shift);
    step_ = static_cast<index_t>(blockDim.y * t.row_windows * kVecSize);
  }

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
    return (int64_t{split_} * t_.row_windows + column_) * kVecSize + lane;
  }
  // Of the lanes of a row group that hold a channel, the first one owns it.
  __device__ __forceinline__ bool owns_channel(int lane) const {
    return split_ == 0 && member() == 0 && channel_valid(lane) &&
           int64_t{column_} * kVecSize + lane < t_.c;
  }

  __device__ __forceinline__ Window<index_t> current() const {
    Window<index_t> window{offset_, 0, kVecSize};
    if (!kExact) {
      const int64_t until = t_.numel - offset_;
      window.lo = offset_ < 0 ? static_cast<int>(-offset_) : 0;
      window.hi = until < kVecSize ? static_cast<int>(until) : kVecSize;
    }
    return window;
  }

 protected:
  const Traversal& t_;
  int split_;
  index_t column_;

  using Walk::offset_;
  using Walk::step_;
};

// Along a row: columns as along C, but several of them are one channel (plan.h). For runs too short
// or too odd for whole windows along S, and for channels-last rows that are no whole windows: a row
// of all channels, or a few rows together, always is. The masked form, where the tensor is no whole
// number of rows, is for elementwise kernels.
template <typename scalar, typename index, bool exact = true>
struct AlongRow : AlongC<scalar, index, exact> {
  using Base = AlongC<scalar, index, exact>;
  static constexpr Pattern kPattern = Pattern::kAlongRow;

  using Base::Base;

  // Where the block's channels begin among its columns, in sample j of the row.
  __device__ __forceinline__ int first_column(int j) const {
    return j * static_cast<int>(this->t_.segments * this->t_.s);
  }

  // The channel of a lane among those of the channel block.
  __device__ __forceinline__ int segment(int lane) const {
    const int in_block = threadIdx.x * Base::kVecSize + lane;
    return in_block / static_cast<int>(this->t_.s) % static_cast<int>(this->t_.segments);
  }
  __device__ __forceinline__ int64_t channel(int lane) const {
    return position(lane) / this->t_.s % this->t_.c;
  }
  // Of the columns that hold a channel, the first one owns it.
  __device__ __forceinline__ bool owns_channel(int lane) const {
    const Traversal& t = this->t_;
    const bool first = position(lane) < t.c * t.s && position(lane) % t.s == 0;
    return this->split_ == 0 && Base::member() == 0 && this->channel_valid(lane) && first;
  }

 private:
  // Of a lane in its row.
  __device__ __forceinline__ int64_t position(int lane) const {
    return int64_t{this->column_} * Base::kVecSize + lane;
  }
};

// Along a row, in teams, masked: a channel block is `segments` whole channels of a sample,
// threadIdx.x a window of it, threadIdx.y walks over the samples. Those that a thread takes start
// at the same place in a window, so that its lanes keep their channels and their masks.
template <typename scalar, typename index>
struct AlongSamples : Strided<AlongSamples<scalar, index>, scalar, index> {
  using Walk = Strided<AlongSamples, scalar, index>;
  using typename Walk::index_t;
  using Walk::kVecSize;
  using Walk::left;
  static constexpr bool kExact = false;
  static constexpr Pattern kPattern = Pattern::kAlongRow;

  __device__ __forceinline__ AlongSamples(const Traversal& t, int64_t task)
      : AlongSamples(t, task / t.channel_blocks, task % t.channel_blocks) {}
  __device__ __forceinline__ AlongSamples(const Traversal& t, int64_t split, int64_t channel_block)
      : t_(t), split_(static_cast<int>(split)), first_(channel_block * t.segments) {
    const int64_t sample = split * t.per_split * t.row_repeat + threadIdx.y;
    const int64_t end = min_of((split + 1) * t.per_split * t.row_repeat, t.n);
    const int64_t run = min_of(t.segments, t.c - first_) * t.s;
    const int before = window_start(sample) - threadIdx.x * kVecSize;  // of the first channel
    lo_ = before > 0 ? before : 0;
    hi_ = static_cast<int>(min_of(before + run, kVecSize));
    offset_ = (sample * t.c + first_) * t.s - before;
    step_ = int64_t{blockDim.y} * t.c * t.s;
    if (lo_ < hi_ && sample < end) left = (end - sample + blockDim.y - 1) / blockDim.y;
  }

  __device__ __forceinline__ Window<index_t> current() const { return {offset_, lo_, hi_}; }

  __device__ __forceinline__ bool channel_valid(int lane) const {
    return lane >= lo_ && lane < hi_;
  }
  __device__ __forceinline__ int64_t channel(int lane) const { return first_ + segment(lane); }
  __device__ __forceinline__ bool owns_channel(int lane) const {
    return split_ == 0 && threadIdx.y == 0 && channel_valid(lane) && place(lane) % t_.s == 0;
  }

  // See AlongRow; sample j is threadIdx.y == j.
  __device__ __forceinline__ int first_column(int j) const {
    return j * blockDim.x * kVecSize + window_start(j);
  }
  __device__ __forceinline__ int segment(int lane) const {
    return channel_valid(lane) ? place(lane) / static_cast<int>(t_.s) : 0;
  }

 private:
  // Where the block's channels begin in a window, in this sample.
  __device__ __forceinline__ int window_start(int64_t sample) const {
    return static_cast<int>((sample * t_.c + first_) * t_.s & (kVecSize - 1));
  }
  // Of a lane among the block's elements of a sample.
  __device__ __forceinline__ int place(int lane) const {
    return threadIdx.x * kVecSize + lane - window_start(threadIdx.y);
  }

  const Traversal& t_;
  int split_;
  int64_t first_;  // channel
  int lo_, hi_;

  using Walk::offset_;
  using Walk::step_;
};

}  // namespace batchnorm_cuda
