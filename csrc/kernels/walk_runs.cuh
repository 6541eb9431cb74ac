// Walks over runs of S: a thread has one channel at a time (traversal.cuh).
#pragma once

#include "../geometry.h"
#include "parts.cuh"
#include "vec_io.cuh"

namespace batchnorm_cuda {

// Along S: the block's threads_y groups take one channel each; the windows of a channel, N runs of
// row_windows, are numbered through, and a group's threads take every threads_x-th of them.
template <typename scalar, typename index>
struct AlongS {
  using scalar_t = scalar;
  using index_t = index;
  static constexpr bool kExact = true;  // no edges, and every tensor on 16-byte boundaries
  static constexpr bool kEdges = false;
  static constexpr Lanes kLanes = Lanes::kAll;
  static constexpr int kVecSize = kVec<scalar_t>;
  static constexpr Pattern kPattern = Pattern::kAlongS;
  static constexpr int kChannels = 1;  // channels per thread: all lanes are of the same one
  __device__ __forceinline__ static constexpr int channel_of(int) { return 0; }

  index_t left = 0;

  __device__ __forceinline__ AlongS(const Traversal& t, const Part& part) : t_(t), row_(part.row) {
    channel_ = static_cast<index_t>(part.channel_block * blockDim.y + threadIdx.y);
    const int64_t first = part.first + threadIdx.x;
    if (!channel_valid(0) || first >= part.end || t.row_windows == 0) return;
    const int64_t step = blockDim.x;
    left = static_cast<index_t>((part.end - first + step - 1) / step);
    const int64_t run = first / t.row_windows;
    column_ = static_cast<index_t>(first - run * t.row_windows);
    run_start_ = static_cast<index_t>((run * t.c + channel_) * t.s);
    const int64_t step_runs = step / t.row_windows;
    step_columns_ = static_cast<index_t>(step - step_runs * t.row_windows);
    step_elements_ = static_cast<index_t>(step_runs * t.c * t.s);
  }

  __device__ __forceinline__ Window<index_t> take() {
    const Window<index_t> window{place(), 0, kVecSize};
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
    return {place(), 0, kVecSize};
  }

  // Goes behind the last window of the part, for a walk by take_back(). Returns how many there are.
  __device__ __forceinline__ index_t seek_end(const Part& part) {
    const index_t windows = left;
    if (windows == 0) return 0;
    const int64_t end = part.first + threadIdx.x + int64_t{left} * blockDim.x;
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
    return int64_t{row_} * t_.c + channel_;
  }
  // True in one thread per channel and kernel.
  __device__ __forceinline__ bool owns_channel(int) const {
    return row_ == 0 && member() == 0 && channel_valid(0);
  }

 protected:
  // Of the next window, counted from the start of its run.
  __device__ __forceinline__ index_t place() const { return run_start_ + column_ * kVecSize; }

  const Traversal& t_;
  int row_;
  index_t channel_, column_ = 0, run_start_ = 0, step_columns_ = 0, step_elements_ = 0;
};

// Along S, where indices have 64 bits, of which every operation takes two instructions: the place
// of the next window is kept instead of its run's, and the columns behind it, whose sign tells a
// run's end. And where runs are no whole windows, or begin anywhere (`exact` is false): a run then
// gives the row_windows whole windows that every run has, from its first boundary on.
template <typename scalar, typename index, bool exact>
struct AlongRuns : AlongS<scalar, index> {
  using Base = AlongS<scalar, index>;
  using typename Base::index_t;
  static constexpr bool kExact = exact;
  static constexpr bool kEdges = !exact;

  __device__ __forceinline__ AlongRuns(const Traversal& t, const Part& part) : Base(t, part) {
    if (kEdges && this->channel_valid(0)) {
      const int64_t per_run = t.row_windows > 0 ? t.row_windows : 1;
      first_run_ = static_cast<index_t>((part.first + per_run - 1) / per_run);
      runs_ = static_cast<index_t>((part.end + per_run - 1) / per_run) - first_run_;
    }
    begin(false);
    step_ = this->step_elements_ + this->step_columns_ * Base::kVecSize;
    next_run_ = static_cast<index_t>(t.c * t.s - t.row_windows * Base::kVecSize);
  }

  __device__ __forceinline__ Window<index_t> take() {
    const Window<index_t> window = current();
    place_ += step_;
    behind_ -= static_cast<int32_t>(this->step_columns_);
    if (behind_ < 0) {
      behind_ += row_windows();
      place_ += next_run_;
    }
    --this->left;
    return window;
  }
  __device__ __forceinline__ Window<index_t> take_back() {
    place_ -= step_;
    behind_ += static_cast<int32_t>(this->step_columns_);
    if (behind_ >= row_windows()) {
      behind_ -= row_windows();
      place_ -= next_run_;
    }
    ++this->left;
    return current();
  }
  __device__ __forceinline__ index_t seek_end(const Part& part) {
    const index_t windows = Base::seek_end(part);
    begin(true);
    return windows;
  }
  __device__ __forceinline__ void forget() { forget_derived(place_); }

  // What the whole windows leave of the runs: a head up to the first boundary, and a tail, which
  // may reach into a second window. A part takes all heads of the runs that begin in it, then all
  // tails.
  class Edges {
   public:
    __device__ __forceinline__ explicit Edges(const AlongRuns& cursor) : cursor_(cursor) {
      const Traversal& t = cursor.t_;
      start_ = static_cast<index_t>((int64_t{cursor.first_run_} * t.c + cursor.channel_) * t.s);
      next_parts();
    }
    __device__ __forceinline__ bool any() const { return run_ < cursor_.runs_; }
    __device__ __forceinline__ Window<index_t> take() {
      const Traversal& t = cursor_.t_;
      const index_t start = start_ + run_ * static_cast<index_t>(t.c * t.s);
      const index_t before = (start + cursor_.shift()) & kLanesMask;
      const bool head = part_ == 0 && before > 0;
      const index_t column = part_ + (head ? 0 : static_cast<index_t>(t.row_windows));
      const index_t from = column * Base::kVecSize - before;  // the start of the run
      const int64_t until = t.s - from;
      const int lo = column == 0 ? static_cast<int>(before) : 0;
      const Window<index_t> window{start + from, lo,
                                   static_cast<int>(min_of(until, Base::kVecSize))};
      run_ += Base::members();
      next_parts();
      return window;
    }

   private:
    static constexpr int kParts = 3;  // of a run: its head and two windows of its tail
    __device__ __forceinline__ void next_parts() {
      const index_t runs = cursor_.runs_;
      for (; part_ < kParts - 1 && run_ >= runs; ++part_) run_ -= runs > 0 ? runs : 0;
    }

    const AlongRuns& cursor_;
    index_t run_ = Base::member(), start_;
    int part_ = 0;
  };
  __device__ __forceinline__ Edges edges() const { return Edges(*this); }

 private:
  // `place_` is past the boundary that it is rounded down to, by what leads to the next one.
  static constexpr index_t kLanesMask = Base::kVecSize - 1;

  // With 32-bit indices walk teams only, whose tensors begin on a boundary.
  static constexpr bool kOfTeam = sizeof(index_t) == sizeof(int32_t);
  __device__ __forceinline__ int shift() const { return kOfTeam ? 0 : this->t_.shift; }

  // Columns as far as a walk can tell them: it ends within kMaxPerSplit windows.
  __device__ __forceinline__ static int32_t columns(int64_t count) {
    return static_cast<int32_t>(kOfTeam ? count : min_of(count, 2 * kMaxPerSplit));
  }
  __device__ __forceinline__ int32_t row_windows() const { return columns(this->t_.row_windows); }
  __device__ __forceinline__ Window<index_t> current() const {
    if (exact) return {place_, 0, Base::kVecSize};
    return {(place_ & ~kLanesMask) - shift(), 0, Base::kVecSize};
  }
  // For a walk by take(), or from the end by take_back().
  __device__ __forceinline__ void begin(bool back) {
    place_ = this->place();
    if (!exact) place_ += shift() + kLanesMask;
    behind_ = back ? row_windows() - 1 - columns(this->column_)
                   : columns(this->t_.row_windows - 1 - this->column_);
  }

  index_t place_, step_, next_run_;
  int32_t behind_;
  index_t first_run_ = 0, runs_ = 0;  // whose edges are this part's
};

}  // namespace batchnorm_cuda
