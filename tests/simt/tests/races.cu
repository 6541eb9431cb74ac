// Planted: accesses of two threads to the same bytes that nothing orders; and what does order them.
#include <set>
#include <string>

#include "harness.h"

namespace simt_test {
namespace {

// Thread i writes slot i; thread i reads slot i ^ flip. Rounds reuse the slots.
enum class Sync { kNone, kBlock, kWarp, kShuffle };

__device__ void synchronise(Sync sync) {
  if (sync == Sync::kBlock) __syncthreads();
  if (sync == Sync::kWarp) __syncwarp();
  if (sync == Sync::kShuffle) __shfl_sync(0xffffffffu, 0, 0);
}

__global__ void exchange_kernel(unsigned int flip, int rounds, Sync after_write, Sync after_read) {
  int* slots = static_shared<int[64]>();
  for (int round = 0; round < rounds; ++round) {
    store_shared(slots + threadIdx.x, round);
    synchronise(after_write);
    EXPECT(load_shared(slots + (threadIdx.x ^ flip)) == round);
    synchronise(after_read);
  }
}

SIMT_CASE(shared_exchange_with_barriers) {
  launch({2, 64}, exchange_kernel, 33u, 4, Sync::kBlock, Sync::kBlock);
  launch({2, 64}, exchange_kernel, 1u, 4, Sync::kWarp, Sync::kWarp);
  launch({2, 64}, exchange_kernel, 1u, 4, Sync::kWarp, Sync::kBlock);
  launch({2, 64}, exchange_kernel, 0u, 4, Sync::kNone, Sync::kNone);
}

SIMT_CASE(shared_read_after_write_race) {
  const auto race = [](unsigned int flip, Sync sync) {
    // All slots are written before, so that what is read is not merely uninitialised.
    expect_fault([=] { launch({1, 64}, exchange_kernel, flip, 2, sync, Sync::kBlock); },
                 {"exchange_kernel"});
  };
  race(33, Sync::kNone);
  race(33, Sync::kWarp);
  race(1, Sync::kShuffle);
}

SIMT_CASE(shared_write_after_read_race) {
  const auto race = [](unsigned int flip, Sync sync) {
    expect_fault([=] { launch({1, 64}, exchange_kernel, flip, 2, Sync::kBlock, sync); },
                 {"shared memory race", "with no barrier between the two"});
  };
  race(33, Sync::kNone);
  race(33, Sync::kWarp);
  race(1, Sync::kShuffle);
}

__global__ void same_slot_kernel(unsigned int writers) {
  int* slot = &static_shared<int>();
  if (threadIdx.x < writers) MARK, store_shared(slot, 1);
}

SIMT_CASE(shared_write_write_race) {
  launch({2, 64}, same_slot_kernel, 1u);
  expect_fault([] { launch({2, 64}, same_slot_kernel, 2u); },
               {"shared memory race: writes at byte offset", "written by block", "thread ("});
}

// All read one slot, in each of these groups, and then one thread writes it.
__global__ void broadcast_kernel(unsigned int readers, Sync sync) {
  int* slot = &static_shared<int>();
  if (threadIdx.x == 0) store_shared(slot, 5);
  __syncthreads();
  if (threadIdx.x < readers) EXPECT(load_shared(slot) == 5);
  synchronise(sync);
  if (threadIdx.x == 1) store_shared(slot, 6);
}

SIMT_CASE(shared_broadcast_then_write) {
  launch({2, 64}, broadcast_kernel, 64u, Sync::kBlock);
  launch({2, 64}, broadcast_kernel, 32u, Sync::kWarp);
  launch({2, 64}, broadcast_kernel, 0u, Sync::kNone);
  expect_fault([] { launch({2, 64}, broadcast_kernel, 64u, Sync::kNone); }, {"shared memory race"});
  expect_fault([] { launch({2, 64}, broadcast_kernel, 33u, Sync::kWarp); }, {"shared memory race"});
  expect_fault([] { launch({2, 64}, broadcast_kernel, 1u, Sync::kNone); }, {"shared memory race"});
}

__global__ void partial_warp_sync_kernel(unsigned int mask) {
  int* slot = &static_shared<int>();
  if (threadIdx.x == 3) store_shared(slot, 1);
  if ((mask >> threadIdx.x & 1) != 0) __syncwarp(mask);
  if (threadIdx.x == 4) load_shared(slot);
}

SIMT_CASE(warp_sync_orders_only_its_lanes) {
  launch({1, 32}, partial_warp_sync_kernel, 0x18u);
  expect_fault([] { launch({1, 32}, partial_warp_sync_kernel, 0x30u); }, {"shared memory"});
}

__global__ void parts_of_a_word_kernel(bool overlap) {
  auto* bytes = reinterpret_cast<unsigned char*>(static_shared<uint4[2]>());
  if (threadIdx.x == 0) store_shared(reinterpret_cast<uint2*>(bytes), uint2{});
  if (threadIdx.x == 1) store_shared(reinterpret_cast<unsigned int*>(bytes + 8), 1u);
  if (threadIdx.x == 2) {
    store_shared(reinterpret_cast<unsigned short*>(bytes + (overlap ? 6 : 12)),
                 static_cast<unsigned short>(1));
  }
  if (threadIdx.x == 3) store_shared(bytes + 14, static_cast<unsigned char>(1));
}

SIMT_CASE(races_are_told_by_the_byte) {
  launch({1, 4}, parts_of_a_word_kernel, false);
  expect_fault([] { launch({1, 4}, parts_of_a_word_kernel, true); }, {"shared memory race"});
}

__global__ void one_output_kernel(Buffer<int> out) { MARK, store_global(out.data, 1); }

SIMT_CASE(global_write_write_race) {
  Memory<int> out(1);
  launch({1, 1}, one_output_kernel, out.as(Use::kOutput));
  expect_fault(
      [&] { launch({1, 2}, one_output_kernel, out.as(Use::kOutput)); },
      {"global memory race: writes byte offset 0 of 'buffer'", "written by block (0,0,0)"});
  expect_fault([&] { launch({2, 1}, one_output_kernel, out.as(Use::kOutput)); },
               {"global memory race", "nothing ordering"});
}

__global__ void shift_in_place_kernel(Buffer<int> values, unsigned int size) {
  const unsigned int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int neighbour = load_global(values.data + (i + 1) % size);
  __syncthreads();
  store_global(values.data + i, neighbour);
}

SIMT_CASE(global_read_write_race_in_place) {
  Memory<int> values(64, 2);
  launch({1, 64}, shift_in_place_kernel, values.as(Use::kInPlace), 64u);
  expect_fault([&] { launch({2, 32}, shift_in_place_kernel, values.as(Use::kInPlace), 64u); },
               {"global memory race", "of 'buffer'"});
}

__global__ void read_and_write_kernel(Buffer<int> value) {
  if (blockIdx.x == 0) load_global(value.data);
  if (blockIdx.x == 1) store_global(value.data, 1);
}

SIMT_CASE(global_race_in_either_order) {
  Memory<int> value(1, 2);
  std::set<std::string> orders;
  for (uint64_t seed = 0; seed < 16; ++seed) {
    simt::set_seed(seed);
    expect_fault(
        [&] {
          try {
            launch({2, 1}, read_and_write_kernel, value.as(Use::kInPlace));
          } catch (const simt::Fault& fault) {
            const bool reads =
                std::string(fault.what()).find("reads byte offset") != std::string::npos;
            orders.insert(reads ? "reads" : "writes");
            throw;
          }
        },
        {"global memory race", "byte offset 0"});
  }
  EXPECT(orders.size() == 2);
}

// Block 0 hands a value to block 1 through plain memory and a flag.
enum class Handover { kRelaxed, kFences, kNoReleaseFence, kNoAcquireFence, kOrdered };

template <typename T>
T atomic_load(const T* address, simt::Order order, simt::Site site = simt::Site::current()) {
  simt::on_atomic_access(address, sizeof(T), simt::Access::kRead, order, site);
  return *address;
}
template <typename T>
void atomic_store(T* address, T value, simt::Order order, simt::Site site = simt::Site::current()) {
  simt::on_atomic_access(address, sizeof(T), simt::Access::kWrite, order, site);
  *address = value;
}

__global__ void handover_kernel(Buffer<int> data, Buffer<int> flag, Handover how) {
  const bool ordered = how == Handover::kOrdered;
  if (blockIdx.x == 0) {
    store_global(data.data + threadIdx.x, static_cast<int>(threadIdx.x));
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (how == Handover::kFences || how == Handover::kNoAcquireFence) __threadfence();
    atomic_store(flag.data, 1, ordered ? simt::Order::kRelease : simt::Order::kRelaxed);
  } else {
    if (threadIdx.x == 0) {
      while (atomic_load(flag.data, ordered ? simt::Order::kAcquire : simt::Order::kRelaxed) == 0) {
      }
      if (how == Handover::kFences || how == Handover::kNoReleaseFence) __threadfence();
    }
    __syncthreads();
    const unsigned int other = threadIdx.x ^ 5;
    EXPECT(load_global(data.data + other) == static_cast<int>(other));
  }
}

SIMT_CASE(handover_between_blocks) {
  Shape shape{2, 64};
  shape.cooperative = true;
  Memory<int> data(64);
  const auto hand_over = [&](Handover how) {
    Memory<int> flag(1);
    launch(shape, handover_kernel, data.as(Use::kOutput), flag.as(Use::kPersistent), how);
  };
  hand_over(Handover::kFences);
  hand_over(Handover::kOrdered);
  for (Handover how : {Handover::kRelaxed, Handover::kNoReleaseFence, Handover::kNoAcquireFence}) {
    expect_fault([&] { hand_over(how); },
                 {"handover_kernel", "global memory race: reads", "written by block (0,0,0)"});
  }
}

// The last block to finish sums what all wrote: thread fences, a counter, no co-residency needed.
__global__ void last_block_sums_kernel(Buffer<int> partials, Buffer<unsigned int> counter,
                                       Buffer<int> out, bool fences) {
  store_global(partials.data + blockIdx.x * blockDim.x + threadIdx.x, 1);
  if (fences) __threadfence();
  __syncthreads();
  bool* last = &static_shared<bool>();
  if (threadIdx.x == 0) {
    store_shared(last, atomicAdd(counter.data, 1u) == gridDim.x - 1);
    if (fences) __threadfence();
  }
  __syncthreads();
  if (!load_shared(last) || threadIdx.x != 0) return;
  int sum = 0;
  for (unsigned int i = 0; i < gridDim.x * blockDim.x; ++i) sum += load_global(partials.data + i);
  store_global(out.data, sum);
}

SIMT_CASE(last_block_sums) {
  Memory<int> partials(320);
  Memory<int> out(1);
  const auto sum = [&](bool fences) {
    Memory<unsigned int> counter(1);
    launch({10, 32}, last_block_sums_kernel, partials.as(Use::kScratch),
           counter.as(Use::kPersistent), out.as(Use::kOutput), fences);
  };
  sum(true);
  EXPECT(out[0] == 320);
  expect_fault([&] { sum(false); }, {"global memory race: reads"});
}

__global__ void atomic_and_plain_kernel(Buffer<int> word, bool plain) {
  atomicAdd(word.data, 1);
  if (plain && blockIdx.x == 1) load_global(word.data);
}

SIMT_CASE(plain_access_races_with_atomics) {
  Memory<int> word(1, 1);
  launch({4, 32}, atomic_and_plain_kernel, word.as(Use::kInPlace), false);
  EXPECT(word[0] == 129);
  expect_fault([&] { launch({4, 32}, atomic_and_plain_kernel, word.as(Use::kInPlace), true); },
               {"global memory race"});
}

__global__ void atomic_in_shared_kernel(Buffer<int> out, bool early) {
  int* sum = &static_shared<int>();
  if (threadIdx.x == 0) store_shared(sum, 0);
  if (!early) __syncthreads();
  atomicAdd(sum, 1);
  __syncthreads();
  if (threadIdx.x == 0) store_global(out.data, load_shared(sum));
}

SIMT_CASE(atomics_in_shared_memory) {
  Memory<int> out(1);
  launch({1, 64}, atomic_in_shared_kernel, out.as(Use::kOutput), false);
  EXPECT(out[0] == 64);
  expect_fault([&] { launch({1, 64}, atomic_in_shared_kernel, out.as(Use::kOutput), true); },
               {"shared memory"});
}

}  // namespace
}  // namespace simt_test
