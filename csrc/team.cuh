// A team: blocks that share a channel group, each holding its part of the data on chip. Here is how
// they merge their partial results; team_kernel.cuh is what they do around it.
//
// Each block publishes one slot of partial results a round and reads the slots of all ranks,
// merging them in the same order, so that every block holds the same bits without a leader. Two
// slots a block, used in turn, suffice: a block writes a slot again two rounds later, after it has
// waited for every rank's slot of the round between, which a rank publishes only when it is done
// reading.
//
// Scope kGrid, why a reader sees the slots (CUDA C++ memory model, device scope): the writers'
// plain stores happen before thread 0's release store of the flag by way of __syncthreads; the
// polling thread's acquire load that sees the flag synchronises with it; the readers' plain loads
// come after the polling thread by way of the second __syncthreads. Waiting cannot deadlock because
// the launch is cooperative: all blocks are resident or the launch fails. Flags only grow: they
// hold the epoch of the launch plus the round, and the last block to finish moves the epoch past
// all rounds, so that the words serve the next launch on the stream, or the next replay of a graph,
// as they are.
#pragma once

#include "accumulate.cuh"

namespace batchnorm_cuda {

// The 64-bit words of the global workspace that order a kGrid launch; zero before the first one.
enum SyncWord : int { kEpoch = 0, kFinished = 1, kFirstFlag = 2 };

template <typename Cursor, typename Acc, typename acc_t>
class TeamExchange {
 public:
  // `scratch` and `shared_slots`: shared memory of the plan's sizes; `global_slots` and `sync`: the
  // workspace of a kGrid launch, else null.
  __device__ __forceinline__ TeamExchange(const Team& team, acc_t* scratch, acc_t* shared_slots,
                                          acc_t* global_slots, uint64_t* sync)
      : team_(team),
        scratch_(scratch),
        shared_slots_(shared_slots),
        global_slots_(global_slots),
        sync_(sync) {
    if (team.scope == Scope::kGrid) epoch_ = load_acquire(sync + kEpoch);
  }

  // With the ranks of a cluster in neighbouring blocks, for every scope.
  __device__ __forceinline__ int rank() const { return blockIdx.x % team_.size; }
  __device__ __forceinline__ int64_t team() const { return blockIdx.x / team_.size; }

  // Merges the accumulators of all threads of the team that serve the same channels; every thread
  // gets the result. Every thread of every block of the team must call.
  __device__ __forceinline__ void all_reduce(const Cursor& cursor, Acc (&acc)[Cursor::kChannels]) {
    if constexpr (Cursor::kPattern == Pattern::kAlongRow) {
      all_reduce_segments(cursor, acc);
    } else {
      all_reduce_columns(acc);
    }
  }

  // To be called once by every thread when the block has no more rounds.
  __device__ __forceinline__ void finish() {
    if (team_.scope == Scope::kCluster) {
      cluster_barrier();  // no block leaves while another may still read its slots
    } else if (team_.scope == Scope::kGrid) {
      __syncthreads();
      if (threadIdx.x + threadIdx.y == 0 &&
          fetch_add(sync_ + kFinished, uint64_t{1}) == gridDim.x - 1) {
        // Every block has read the epoch before it was counted.
        store_release(sync_ + kFinished, uint64_t{0});
        store_release(sync_ + kEpoch, epoch_ + static_cast<uint64_t>(team_.rounds));
      }
    }
  }

 private:
  // A thread's lanes are whole channels, or one: the same threads of each block hold a channel.
  __device__ __forceinline__ void all_reduce_columns(Acc (&acc)[Cursor::kChannels]) {
    reduce_members<Cursor>(acc, scratch_);
    if (team_.scope != Scope::kBlock) {
      if (Cursor::member() == 0) publish(acc);
      wait_for_team();
#pragma unroll
      for (int c = 0; c < Cursor::kChannels; ++c) acc[c] = Acc();
      for (int rank = Cursor::member(); rank < team_.size; rank += Cursor::members()) {
        merge_slot(acc, rank);
      }
      reduce_members<Cursor>(acc, scratch_);
      ++round_;
    }
    if constexpr (Cursor::kChannels > 1) column_broadcast(acc, scratch_);
  }

  // Several columns are one channel. Threads merge over rows as along C; then a warp takes a
  // channel at a time and merges its columns, and in the same way the ranks' results for it.
  __device__ __forceinline__ void all_reduce_segments(const Cursor& cursor,
                                                      Acc (&acc)[Cursor::kChannels]) {
    const Traversal& t = team_.traversal;
    const int segments = static_cast<int>(t.segments);
    const int columns = blockDim.x * Cursor::kChannels;
    const int threads = blockDim.x * blockDim.y;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    acc_t* const channels = scratch_ + Acc::kFields * columns;  // after the columns, field by field
    column_reduce(acc, scratch_);
    if (threadIdx.y == 0) {
#pragma unroll
      for (int i = 0; i < Cursor::kChannels * Acc::kFields; ++i) {
        const int c = i / Acc::kFields, f = i % Acc::kFields;
        store_shared(scratch_ + f * columns + threadIdx.x * Cursor::kChannels + c, acc[c].field(f));
      }
    }
    __syncthreads();
    reduce_segments(channels, static_cast<int>(t.segment_size), [&](int k, int i, int f) {
      const int column = static_cast<int>(k * t.segment_step + i * t.segment_stride);
      return load_shared(scratch_ + f * columns + column);
    });
    if (team_.scope != Scope::kBlock) {
      for (int i = thread; i < segments * Acc::kFields; i += threads) {
        store_slot(i, load_shared(channels + i));
      }
      wait_for_team();
      reduce_segments(channels, team_.size,
                      [&](int k, int rank, int f) { return load_slot(rank, f * segments + k); });
      ++round_;
    }
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) {
      const int k = cursor.segment(c);
#pragma unroll
      for (int f = 0; f < Acc::kFields; ++f) {
        acc[c].field(f) = load_shared(channels + f * segments + k);
      }
    }
    __syncthreads();
  }

  // channels[f][k] = merge over i < size of value(k, i, f), one warp a channel; whole warps only,
  // so that every lane takes part in the shuffles. A barrier ends the call.
  template <typename Value>
  __device__ __forceinline__ void reduce_segments(acc_t* channels, int size, Value&& value) {
    const int segments = static_cast<int>(team_.traversal.segments);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int warps = blockDim.x * blockDim.y / kWarpSize;
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    for (int k = warp < warps ? warp : segments; k < segments; k += warps) {
      Acc acc;
      for (int i = lane; i < size; i += kWarpSize) {
        Acc other;
#pragma unroll
        for (int f = 0; f < Acc::kFields; ++f) other.field(f) = value(k, i, f);
        acc.merge(other);
      }
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        acc.merge(shuffle_down(acc, offset, kWarpSize));
      }
      if (lane == 0) {
#pragma unroll
        for (int f = 0; f < Acc::kFields; ++f) {
          store_shared(channels + f * segments + k, acc.field(f));
        }
      }
    }
    __syncthreads();
  }

  // This thread's place in a slot: field f of its channel c.
  __device__ __forceinline__ int64_t index(int c, int f) const {
    const int column = Cursor::kChannels == 1 ? threadIdx.y : threadIdx.x;
    const int columns = Cursor::kChannels == 1 ? blockDim.y : blockDim.x;
    return (f * Cursor::kChannels + c) * columns + column;
  }

  __device__ __forceinline__ int64_t parity_offset() const {
    return (round_ & 1) * team_.slot_values;
  }

  __device__ __forceinline__ acc_t* global_slot(int rank) const {
    return global_slots_ + (team() * team_.size + rank) * 2 * team_.slot_values + parity_offset();
  }

  // Value i of this block's slot of the round.
  __device__ __forceinline__ void store_slot(int64_t i, acc_t value) const {
    if (team_.scope == Scope::kCluster) {
      store_shared(shared_slots_ + parity_offset() + i, value);
    } else {
      store_global(global_slot(rank()) + i, value);
    }
  }

  __device__ __forceinline__ acc_t load_slot(int rank, int64_t i) const {
    if (team_.scope == Scope::kCluster) {
      return load_shared(cluster_shared(shared_slots_ + parity_offset(), rank) + i);
    }
    return load_global(global_slot(rank) + i);
  }

  __device__ __forceinline__ void publish(Acc (&acc)[Cursor::kChannels]) {
#pragma unroll
    for (int i = 0; i < Cursor::kChannels * Acc::kFields; ++i) {
      const int c = i / Acc::kFields, f = i % Acc::kFields;
      store_slot(index(c, f), acc[c].field(f));
    }
  }

  __device__ __forceinline__ void merge_slot(Acc (&acc)[Cursor::kChannels], int rank) {
#pragma unroll
    for (int c = 0; c < Cursor::kChannels; ++c) {
      Acc other;
#pragma unroll
      for (int f = 0; f < Acc::kFields; ++f) other.field(f) = load_slot(rank, index(c, f));
      acc[c].merge(other);
    }
  }

  // Returns when every rank has published its slot of this round.
  __device__ __forceinline__ void wait_for_team() {
    if (team_.scope == Scope::kCluster) {
      cluster_barrier();
      return;
    }
    const uint64_t expected = epoch_ + static_cast<uint64_t>(round_) + 1;
    uint64_t* const flags = sync_ + kFirstFlag + team() * team_.size;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();
    if (thread == 0) store_release(flags + rank(), expected);
    for (int rank = thread; rank < team_.size; rank += blockDim.x * blockDim.y) {
      while (load_acquire(flags + rank) < expected) {
      }
    }
    __syncthreads();
  }

  const Team& team_;
  acc_t* const scratch_;
  acc_t* const shared_slots_;
  acc_t* const global_slots_;
  uint64_t* const sync_;
  uint64_t epoch_ = 0;
  int64_t round_ = 0;
};

}  // namespace batchnorm_cuda
