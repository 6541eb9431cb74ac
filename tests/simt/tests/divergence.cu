// Planted: barriers and warp operations that not all threads reach, and waiting for ever.
#include "harness.h"

namespace simt_test {
namespace {

__global__ void early_return_kernel(unsigned int stays) {
  if (thread_rank() >= stays) return;
  MARK, __syncthreads();
}

SIMT_CASE(barrier_after_early_return) {
  expect_fault(
      [] { launch({2, 64}, early_return_kernel, 40u); },
      {"early_return_kernel", "block (", "thread (", "divergent barrier", "left the kernel"});
  launch({2, 64}, early_return_kernel, 64u);
}

__global__ void last_thread_returns_kernel() {
  __syncthreads();
  if (thread_rank() == block_threads() - 1) return;
  MARK, __syncthreads();
}

SIMT_CASE(barrier_missed_by_one_thread) {
  expect_fault([] { launch({1, dim3(8, 4)}, last_thread_returns_kernel); },
               {"divergent barrier", "thread (7,3,0)"});
}

// Thread 0 leaves the kernel and thread 1 waits for it, whichever `leaves_first` says first.
template <typename Wait>
__device__ void leave_or_wait(int* flag, bool leaves_first, Wait wait) {
  const bool leaves = threadIdx.x == 0;
  if (leaves == leaves_first) {
    atomicExch(flag, 1);
  } else {
    while (atomicAdd(flag, 0) == 0) {
    }
  }
  if (!leaves) wait();
}

__global__ void leave_barrier_kernel(int* flag, bool leaves_first) {
  leave_or_wait(flag, leaves_first, [] { MARK, __syncthreads(); });
}
__global__ void leave_pair_kernel(int* flag, bool leaves_first) {
  leave_or_wait(flag, leaves_first, [] { MARK, __syncwarp(3); });
}

SIMT_CASE(threads_missing_before_and_after) {
  for (const bool leaves_first : {false, true}) {
    int flag = 0;
    expect_fault([&] { launch({1, 2}, leave_barrier_kernel, &flag, leaves_first); },
                 {"divergent barrier", leaves_first ? "threads have left" : "the thread left"});
    flag = 0;
    expect_fault([&] { launch({1, 2}, leave_pair_kernel, &flag, leaves_first); },
                 {"divergent warp operation",
                  leaves_first ? "lanes that have left the kernel: 0" : "the thread left"});
  }
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

SIMT_CASE(barriers_at_two_sites) {
  expect_fault([] { launch({1, 64}, two_barriers_kernel); },
               {"two_barriers_kernel", "divergent barrier", "wait at divergence.cu:"});
}

template <int kPart>
__device__ int barrier_of_kind(int value) {
  return kPart == 0 ? __syncthreads_or(value) : __syncthreads_and(value);
}
__global__ void two_kinds_kernel() {
  threadIdx.x < 7 ? barrier_of_kind<0>(1) : barrier_of_kind<1>(1);
}

SIMT_CASE(barriers_of_two_kinds) {
  expect_fault([] { launch({1, 32}, two_kinds_kernel); }, {"divergent barrier"});
}

__global__ void mask_without_caller_kernel() { MARK, __shfl_sync(0x0000ffffu, 1.0f, 0); }

SIMT_CASE(mask_lacks_the_caller) {
  expect_fault([] { launch({1, 32}, mask_without_caller_kernel); },
               {"0x0000ffff", "lacks the calling lane"});
}

__global__ void exited_lanes_kernel() {
  if (threadIdx.x >= 24) return;
  MARK, __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

SIMT_CASE(shuffle_with_exited_lanes) {
  expect_fault([] { launch({1, 32}, exited_lanes_kernel); },
               {"exited_lanes_kernel", "divergent warp operation", "left the kernel"});
}

__global__ void absent_lanes_kernel() { MARK, __syncwarp(); }

SIMT_CASE(mask_names_lanes_beyond_the_block) {
  expect_fault([] { launch({1, 40}, absent_lanes_kernel); }, {"does not have: 8-31"});
}

__global__ void two_shuffles_kernel() {
  if (threadIdx.x < 16) {
    __shfl_sync(0xffffffffu, 1, 0);
  } else {
    __shfl_sync(0xffffffffu, 1, 0);
  }
}

SIMT_CASE(shuffles_at_two_sites) {
  expect_fault([] { launch({1, 32}, two_shuffles_kernel); },
               {"divergent warp operation", "waits for lanes", "waits at a warp operation"});
}

__global__ void half_mask_kernel() {
  if (threadIdx.x < 16) MARK, __any_sync(0x0003ffffu, 1);
  __syncthreads();
}

SIMT_CASE(vote_waits_for_lanes_at_a_barrier) {
  expect_fault([] { launch({1, 32}, half_mask_kernel); },
               {"waits for lanes 16-17", "waits at __syncthreads"});
}

__global__ void outside_mask_kernel() {
  if (threadIdx.x < 16) MARK, __shfl_sync(0x0000ffffu, 1, 20);
}

SIMT_CASE(shuffle_from_outside_the_mask) {
  expect_fault([] { launch({1, 32}, outside_mask_kernel); },
               {"reads from lane 20 outside its mask 0x0000ffff"});
}

__global__ void odd_width_kernel() { MARK, __shfl_down_sync(0xffffffffu, 1, 1, 12); }

SIMT_CASE(shuffle_width_no_power_of_two) {
  expect_fault([] { launch({1, 32}, odd_width_kernel); }, {"shuffle width 12"});
}

// Block 1 waits for a word that block 0 writes: fine when both are resident, not guaranteed else.
__global__ void wait_for_block_kernel(Buffer<unsigned int> flag, unsigned int wanted) {
  if (blockIdx.x == 0) {
    atomicAdd(flag.data, 1u);
  } else {
    while (atomicAdd(flag.data, 0u) != wanted) {
    }
  }
}

SIMT_CASE(wait_for_a_word_nobody_writes) {
  Memory<unsigned int> flag(1);
  Shape shape{2, 1};
  shape.cooperative = true;
  launch(shape, wait_for_block_kernel, flag.as(Use::kPersistent), 1u);
  expect_fault([&] { launch(shape, wait_for_block_kernel, flag.as(Use::kPersistent), 7u); },
               {"wait_for_block_kernel", "deadlock", "block (1,0,0) thread (0,0,0)", "polls"});
}

__global__ void wait_for_other_kernel(Buffer<unsigned int> flags) {
  const unsigned int other = blockIdx.x ^ 1;
  if (threadIdx.x == 0) {
    atomicExch(flags.data + blockIdx.x, 1u);
    while (atomicAdd(flags.data + other, 0u) == 0) simt::yield();
  }
  __syncthreads();
}

SIMT_CASE(wait_for_a_block_not_resident) {
  Memory<unsigned int> flags(2);
  expect_fault([&] { launch({2, 32}, wait_for_other_kernel, flags.as(Use::kPersistent)); },
               {"deadlock", "waits at __syncthreads", "polls", "not guaranteed to run"});
  flags[0] = flags[1] = 0;
  Shape shape{2, 32};
  shape.cooperative = true;
  launch(shape, wait_for_other_kernel, flags.as(Use::kPersistent));
}

// Polls a word by plain loads, which another thread may write.
__global__ void plain_poll_kernel(Buffer<unsigned int> flag, bool written) {
  if (blockIdx.x == 0) {
    while (load_global(flag.data) == 0) continue;
  } else if (written) {
    store_global(flag.data, 1u);
  }
}

__global__ void plain_poll_of_shared_kernel(bool written) {
  unsigned int* flag = &static_shared<unsigned int>();
  if (threadIdx.x == 0) store_shared(flag, 0u);
  __syncthreads();
  if (threadIdx.x == 0) {
    while (load_shared(flag) == 0) continue;
  } else if (written) {
    store_shared(flag, 1u);
  }
}

SIMT_CASE(plain_polls) {
  Memory<unsigned int> flag(1);
  Shape shape{2, 1};
  shape.cooperative = true;
  const auto poll = [&](bool written) {
    flag[0] = 0;
    launch(shape, plain_poll_kernel, flag.as(Use::kPersistent), written);
  };
  expect_fault([&] { poll(true); }, {"plain_poll_kernel", "global memory race"});
  expect_fault([&] { poll(false); }, {"plain_poll_kernel", "deadlock", "polls"});
  expect_fault([] { launch({1, 2}, plain_poll_of_shared_kernel, true); }, {"shared memory race"});
  expect_fault([] { launch({1, 2}, plain_poll_of_shared_kernel, false); }, {"deadlock", "polls"});
}

__global__ void poll_with_votes_kernel(Buffer<unsigned int> flag) {
  while (__all_sync(0xffffffffu, atomicAdd(flag.data, 0u) == 0)) {
  }
}

SIMT_CASE(polling_warp_waits_for_ever) {
  Memory<unsigned int> flag(1);
  expect_fault([&] { launch({1, 32}, poll_with_votes_kernel, flag.as(Use::kPersistent)); },
               {"deadlock"});
}

__global__ void cluster_and_block_barrier_kernel() {
  if (threadIdx.x < 32) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  } else {
    __syncthreads();
  }
}

SIMT_CASE(threads_wait_at_different_scopes) {
  Shape shape{2, 64};
  shape.cluster = 2;
  expect_fault([&] { launch(shape, cluster_and_block_barrier_kernel); },
               {"deadlock", "64 threads", "cluster barrier", "__syncthreads"});
}

__global__ void wait_without_arriving_kernel() { MARK, __cluster_barrier_wait(); }
__global__ void arrive_twice_kernel() {
  __cluster_barrier_arrive();
  MARK, __cluster_barrier_arrive();
}

SIMT_CASE(cluster_barrier_out_of_step) {
  Shape shape{2, 64};
  shape.cluster = 2;
  expect_fault([&] { launch(shape, wait_without_arriving_kernel); }, {"without having arrived"});
  expect_fault([&] { launch(shape, arrive_twice_kernel); }, {"arrives twice"});
}

}  // namespace
}  // namespace simt_test
