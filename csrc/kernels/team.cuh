// A team: blocks that share a channel group, each holding its part of the data on chip. Here is how
// they merge their partial results; team_kernel.cuh is what they do around it.
//
// Each block publishes one slot of partial results a round and reads the slots of all ranks,
// merging them in the same order, so that every block holds the same bits without a leader. Two
// slots a block, used in turn, suffice: a block writes a slot again two rounds later, after it has
// waited for every rank's slot of the round between, which a rank publishes only when it is done
// reading. The same chain of flags that shows the slots orders these reads before the later stores.
//
// Two levels, for large teams with many channels: reading every rank's slot would cost each block
// more than its own data. There each rank merges the slots of a slice of the channels, publishes
// these totals, and after a second wait every block reads all totals. With two waits a round, one
// place each would do; slots and totals take turns all the same.
//
// Scope kGrid, why a reader sees the slots (CUDA C++ memory model, device scope): the writers'
// plain stores happen before thread 0's release store of the flag by way of __syncthreads; the
// polling thread's acquire load that sees the flag synchronises with it; the readers' plain loads
// come after the polling thread by way of the second __syncthreads. Waiting cannot deadlock because
// the launch is cooperative (all blocks are resident or the launch fails) and threads of a warp are
// scheduled independently: thread 0 publishes though others of its warp poll. Flags only grow: they
// hold the epoch of the launch plus the waits so far, and the last block to finish moves the epoch
// past all of them, so that the words serve the next launch on the stream, or the next replay of a
// graph, as they are. Only a launch that is aborted leaves them unfit, and with it the context.
//
// Scope kCluster: the barrier of the cluster releases and acquires for all its threads. It orders
// the stores to slots before the others' reads, and those before the stores two rounds later; the
// first one also shows that all blocks have started.
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
    if (team.scope == Scope::kGrid) flag_ = load_acquire(sync + kEpoch);
  }

  // With the ranks of a cluster in neighbouring blocks, for every scope.
  __device__ __forceinline__ int rank() const { return block() % team_.size; }
  __device__ __forceinline__ int team() const { return block() / team_.size; }

  // The team's channel group of this round, or of one `ahead` of it; t.channel_blocks and more once
  // there is none left. Worked out where it is asked for: one register less across a round.
  template <typename index_t>
  __device__ __forceinline__ index_t group(int ahead = 0) const {
    return team() + (round_ + ahead) * static_cast<index_t>(team_.teams);
  }
  __device__ __forceinline__ void end_round() { ++round_; }

  // Merges the accumulators of all threads of the team that serve the same channels. Every thread
  // of every block of the team must call. Along S each thread gets its channel's result.
  __device__ __forceinline__ void all_reduce(Acc& acc) {
    acc = group_reduce(acc, Cursor::members(), scratch_);
    if (team_.scope == Scope::kBlock) return;
    const Slot mine = slot(rank());
    if (Cursor::member() == 0) {
#pragma unroll
      for (int f = 0; f < Acc::kFields; ++f) {
        mine.store(f * blockDim.y + threadIdx.y, acc.field(f));
      }
    }
    wait_for_team();
    acc = Acc();
    const auto value = in_slots(blockDim.y);
#pragma unroll 1
    for (int rank = Cursor::member(); rank < team_.size; rank += Cursor::members()) {
      acc.merge(load<Acc>(value(threadIdx.y, rank)));
      acc.rebase();
    }
    acc = group_reduce(acc, Cursor::members(), scratch_);
  }

  // Where a thread has a channel a lane, returns where the results are in shared memory: field f of
  // the block's k-th channel at f * channels + k. A barrier ends the call.
  __device__ __forceinline__ acc_t* all_reduce(const Cursor& cursor,
                                               Acc (&acc)[Cursor::kChannels]) {
    const int channels = Cursor::channels(team_.traversal);
    acc_t* const results = reduce_block(cursor, acc, channels);
    __syncthreads();
    if (team_.scope == Scope::kBlock) return results;
    const Slot mine = slot(rank());
    const int threads = blockDim.x * blockDim.y;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = thread; i < channels * Acc::kFields; i += threads) {
      mine.store(i, load_shared(results + i));
    }
    wait_for_team();
    if (team_.two_level) {
      merge_slice(channels);
      const acc_t* const all = totals();
      for (int i = thread; i < channels * Acc::kFields; i += threads) {
        store_shared(results + i, load_global(all + i));
      }
    } else {
      merge_each(0, channels, team_.size, in_slots(channels), into(results, channels));
    }
    __syncthreads();
    return results;
  }

  // To be called once by every thread when the block has no more rounds.
  __device__ __forceinline__ void finish() {
    if (team_.scope == Scope::kCluster) {
      cluster_barrier();  // no block leaves while another may still read its slots
    } else if (team_.scope == Scope::kGrid) {
      if (threadIdx.x + threadIdx.y == 0 &&
          fetch_add(sync_ + kFinished, uint64_t{1}) == gridDim.x - 1) {
        // Every block has read the epoch before it was counted: it has had a round, whose barriers
        // lie between.
        const auto waits = static_cast<uint64_t>(team_.rounds * (team_.two_level ? 2 : 1));
        store_release(sync_ + kFinished, uint64_t{0});
        store_release(sync_ + kEpoch, load_acquire(sync_ + kEpoch) + waits);
      }
    }
  }

 private:
  // Where one block publishes: in its shared memory (kCluster) or in the workspace.
  struct Slot {
    acc_t* values;
    bool shared;

    __device__ __forceinline__ acc_t load(int i) const {
      return shared ? load_shared(values + i) : load_global(values + i);
    }
    __device__ __forceinline__ void store(int i, acc_t value) const {
      if (shared) {
        store_shared(values + i, value);
      } else {
        store_global(values + i, value);
      }
    }
  };

  // Hidden from the compiler, which would keep all that follows from it, addresses too, in
  // registers for all rounds; a division a few times a round costs less.
  __device__ __forceinline__ static int block() {
    int index = static_cast<int>(blockIdx.x);
    forget_derived(index);
    return index;
  }

  // Merges the accumulators of the block's threads, over rows first. Where several columns are one
  // channel these are merged then.
  __device__ __forceinline__ acc_t* reduce_block(const Cursor& cursor,
                                                 Acc (&acc)[Cursor::kChannels], int channels) {
    constexpr bool kRows = Cursor::kPattern == Pattern::kAlongRow;
    const Traversal& t = team_.traversal;
    const int kept = Cursor::kExact ? 1 : static_cast<int>(t.row_repeat);
    const int columns = kept * blockDim.x * Cursor::kChannels;
    column_reduce<Cursor::kExact>(acc, scratch_, kept);
    if (threadIdx.y < kept) {
      int first = (threadIdx.y * blockDim.x + threadIdx.x) * Cursor::kChannels;
      forget_derived(first);  // else all addresses below are kept for all rounds
#pragma unroll
      for (int i = 0; i < Cursor::kChannels * Acc::kFields; ++i) {
        const int c = i / Acc::kFields, f = i % Acc::kFields;
        store_shared(scratch_ + f * columns + first + c, acc[c].field(f));
      }
    }
    if constexpr (!kRows) {
      return scratch_;
    } else {
      __syncthreads();
      acc_t* const results = scratch_ + Acc::kFields * columns;
      const int run = static_cast<int>(t.s);
      merge_each(
          0, channels, run * static_cast<int>(t.row_repeat),
          [&](int k, int i) {
            const int column = cursor.first_column(i / run) + k * run + i % run;
            return [=](int f) { return load_shared(scratch_ + f * columns + column); };
          },
          into(results, channels));
      return results;
    }
  }

  // For merge_each: stores the results in shared memory.
  __device__ __forceinline__ auto into(acc_t* results, int channels) const {
    return [=](int k, int f, acc_t value) { store_shared(results + f * channels + k, value); };
  }

  template <typename T, typename Field>
  __device__ __forceinline__ static T load(Field&& field) {
    T acc;
#pragma unroll
    for (int f = 0; f < T::kFields; ++f) acc.field(f) = field(f);
    return acc;
  }

  // store(k, f, result) for first <= k < last, the results being merged over i < size of the
  // accumulators whose fields are value(k, i)(f). As many lanes of a warp share an index k as there
  // are threads for it; whole warps only, so that every lane takes part in the shuffles.
  template <typename Value, typename Store>
  __device__ __forceinline__ void merge_each(int first, int last, int size, Value&& value,
                                             Store&& store) {
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    forget_derived(thread);  // else what follows from it takes registers for all rounds
    const int threads = blockDim.x * blockDim.y / kWarpSize * kWarpSize;
    int lanes = kWarpSize;
    while (lanes > 1 && lanes * (last - first) > threads) lanes /= 2;
    const int lane = thread % lanes;
#pragma unroll 1
    for (int k0 = thread < threads ? first : last; k0 < last; k0 += threads / lanes) {
      const int k = k0 + thread / lanes;
      Acc acc;
#pragma unroll 1
      for (int i = k < last ? lane : size; i < size; i += lanes) {
        acc.merge(load<Acc>(value(k, i)));
        acc.rebase();
      }
#pragma unroll 1
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        acc.merge(shuffle_down(acc, offset, lanes));
        acc.rebase();
      }
      if (lane == 0 && k < last) {
#pragma unroll
        for (int f = 0; f < Acc::kFields; ++f) store(k, f, acc.field(f));
      }
    }
  }

  // The second level: merges this rank's slice of a slot's channels into the totals, and returns
  // when all ranks have.
  __device__ __forceinline__ void merge_slice(int channels) {
    const int first = channels * rank() / team_.size;
    const int last = channels * (rank() + 1) / team_.size;
    acc_t* const all = totals();
    merge_each(first, last, team_.size, in_slots(channels),
               [&](int k, int f, acc_t value) { store_global(all + f * channels + k, value); });
    wait_for_team();
  }

  __device__ __forceinline__ int64_t parity_offset() const {
    return (round_ & 1) * team_.slot_values;
  }

  // The merged results of the team's channels (two levels), after the slots of all blocks.
  __device__ __forceinline__ acc_t* totals() const {
    return global_slots_ + (gridDim.x + team()) * 2 * team_.slot_values + parity_offset();
  }

  // A rank's slot of the round.
  __device__ __forceinline__ Slot slot(int rank) const {
    if (team_.scope == Scope::kCluster) {
      return {cluster_shared(shared_slots_ + parity_offset(), rank), true};
    }
    const int64_t place = (team() * team_.size + rank) * 2 * team_.slot_values;
    return {global_slots_ + place + parity_offset(), false};
  }

  // For merge_each: the accumulators in the slots of all ranks, `channels` to a slot.
  __device__ __forceinline__ auto in_slots(int channels) const {
    return [=](int k, int rank) {
      return [=, from = slot(rank)](int f) { return from.load(f * channels + k); };
    };
  }

  // Returns when every rank has come here as often, and what it published before is visible.
  __device__ __forceinline__ void wait_for_team() {
    if (team_.scope == Scope::kCluster) {
      cluster_barrier();
      return;
    }
    uint64_t* const flags = sync_ + kFirstFlag + team() * team_.size;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();
    ++flag_;
    if (thread == 0) store_release(flags + rank(), flag_);
    for (int rank = thread; rank < team_.size; rank += blockDim.x * blockDim.y) {
      while (load_acquire(flags + rank) < flag_) {
      }
    }
    __syncthreads();
  }

  const Team& team_;
  acc_t* const scratch_;
  acc_t* const shared_slots_;
  acc_t* const global_slots_;
  uint64_t* const sync_;
  uint64_t flag_ = 0;  // this block's latest: the epoch of the launch plus the waits so far
  int round_ = 0;
};

}  // namespace batchnorm_cuda
