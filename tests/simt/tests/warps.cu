// Known-good: shuffles, votes and reductions over block shapes, against plain loops on the host.
#include "harness.h"

namespace simt_test {
namespace {

constexpr unsigned int kAllLanes = 0xffffffffu;

struct Shuffles {
  int direct, up, down, exchanged;
};

__global__ void shuffle_kernel(Buffer<Shuffles> out, int operand, int width) {
  const int mine = static_cast<int>(threadIdx.x) * 3 + 1;
  Shuffles result;
  result.direct = __shfl_sync(kAllLanes, mine, operand, width);
  result.up = __shfl_up_sync(kAllLanes, mine, static_cast<unsigned int>(operand), width);
  result.down = __shfl_down_sync(kAllLanes, mine, static_cast<unsigned int>(operand), width);
  result.exchanged = __shfl_xor_sync(kAllLanes, mine, operand, width);
  store_global(out.data + threadIdx.x, result);
}

// CUDA's rules: segments of `width` lanes; out of the segment, the caller's own value.
Shuffles expected_shuffles(int lane, int operand, int width) {
  const int first = lane / width * width;
  const auto value = [](int from) { return from * 3 + 1; };
  const int exchanged = lane ^ operand;
  return {value(first + operand % width), value(lane - operand >= first ? lane - operand : lane),
          value(lane + operand < first + width ? lane + operand : lane),
          value(exchanged < first + width ? exchanged : lane)};
}

SIMT_CASE(shuffles_of_every_width) {
  Memory<Shuffles> out(32);
  for (int width = 1; width <= 32; width *= 2) {
    for (int operand = 0; operand < 32; ++operand) {
      launch({1, 32}, shuffle_kernel, out.as(Use::kOutput), operand, width);
      for (int lane = 0; lane < 32; ++lane) {
        const Shuffles wanted = expected_shuffles(lane, operand, width);
        const Shuffles& got = out[static_cast<size_t>(lane)];
        EXPECT(got.direct == wanted.direct && got.up == wanted.up && got.down == wanted.down &&
               got.exchanged == wanted.exchanged);
      }
    }
  }
}

template <typename T>
__global__ void shuffle_type_kernel(Buffer<T> out) {
  const T mine = static_cast<T>(threadIdx.x) / 4 - 3;
  store_global(out.data + threadIdx.x, __shfl_xor_sync(kAllLanes, mine, 7));
}

template <typename T>
void check_shuffle_type() {
  Memory<T> out(32);
  launch({1, 32}, shuffle_type_kernel<T>, out.as(Use::kOutput));
  for (size_t i = 0; i < 32; ++i) EXPECT(out[i] == static_cast<T>(i ^ 7) / 4 - 3);
}

SIMT_CASE(shuffles_of_every_type) {
  check_shuffle_type<int>();
  check_shuffle_type<float>();
  check_shuffle_type<double>();
  check_shuffle_type<long long>();
  check_shuffle_type<unsigned long long>();
}

__global__ void vote_kernel(Buffer<unsigned int> out, unsigned int mask) {
  const unsigned int lane = threadIdx.x % 32;
  if ((mask >> lane & 1) == 0) return;
  const unsigned int ballot = __ballot_sync(mask, lane % 3 == 0);
  const bool any = __any_sync(mask, lane == 9) != 0;
  const bool all = __all_sync(mask, lane < 20) != 0;
  store_global(out.data + threadIdx.x, ballot + (any ? 1u << 30 : 0) + (all ? 1u << 31 : 0));
}

SIMT_CASE(votes_within_masks) {
  for (unsigned int mask : {0xffffffffu, 0x000fffffu, 0x55555555u, 0x00000200u}) {
    Memory<unsigned int> out(64, 7);
    launch({1, 64}, vote_kernel, out.as(Use::kPersistent), mask);
    unsigned int wanted = mask & 0x49249249u;
    wanted += (mask >> 9 & 1) != 0 ? 1u << 30 : 0;
    wanted += mask < 1u << 20 ? 1u << 31 : 0;
    for (size_t i = 0; i < 64; ++i) EXPECT(out[i] == ((mask >> i % 32 & 1) != 0 ? wanted : 7));
  }
}

// Two groups of lanes of one warp, each with operations of its own.
__global__ void two_groups_kernel(Buffer<int> out) {
  const unsigned int lane = threadIdx.x;
  const unsigned int mask = lane < 12 ? 0x00000fffu : 0xfffff000u;
  int sum = 0;
  const int rounds = lane < 12 ? 3 : 5;
  for (int i = 0; i < rounds; ++i) sum += __popc(__ballot_sync(mask, 1));
  __syncwarp();
  store_global(out.data + lane, sum);
}

SIMT_CASE(disjoint_masks_in_one_warp) {
  Memory<int> out(32);
  launch({1, 32}, two_groups_kernel, out.as(Use::kOutput));
  for (size_t i = 0; i < 32; ++i) EXPECT(out[i] == (i < 12 ? 36 : 100));
}

// Sum over the block: within warps by shuffles, across them through shared memory. The last warp
// may be partial.
__device__ int block_sum(int value) {
  const unsigned int rank = thread_rank();
  const unsigned int threads = block_threads();
  const unsigned int lane = rank % 32;
  const unsigned int lanes = threads - (rank - lane) < 32 ? threads - (rank - lane) : 32;
  const unsigned int mask = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  int* sums = static_shared<int[32]>();
  for (unsigned int step = 16; step > 0; step /= 2) {
    const int other =
        __shfl_sync(mask, value, static_cast<int>(lane + step < lanes ? lane + step : lane));
    if (lane + step < lanes) value += other;
  }
  if (lane == 0) store_shared(sums + rank / 32, value);
  __syncthreads();
  int total = 0;
  for (unsigned int w = 0; w < (threads + 31) / 32; ++w) total += load_shared(sums + w);
  __syncthreads();
  return total;
}

__global__ void block_sum_kernel(Buffer<int> out) {
  const int mine = static_cast<int>(thread_rank() * thread_rank());
  int total = block_sum(mine);
  total += block_sum(1);
  const unsigned int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  store_global(out.data + block * block_threads() + thread_rank(), total);
}

void check_block_sum(dim3 grid, dim3 block) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  Memory<int> out(static_cast<size_t>(threads) * grid.x * grid.y * grid.z);
  launch({grid, block}, block_sum_kernel, out.as(Use::kOutput));
  int wanted = threads;
  for (int i = 0; i < threads; ++i) wanted += i * i;
  for (size_t i = 0; i < out.size(); ++i) EXPECT(out[i] == wanted);
}

SIMT_CASE(block_sums_of_every_warp_count) {
  for (unsigned int warps = 1; warps <= 32; ++warps) check_block_sum(2, warps * 32);
}

SIMT_CASE(block_sums_of_partial_warps) {
  for (unsigned int threads : {1u, 2u, 31u, 33u, 63u, 65u, 100u, 255u, 1000u, 1023u}) {
    check_block_sum(3, threads);
  }
}

SIMT_CASE(block_sums_of_every_block_shape) {
  for (const dim3 block : {dim3(32, 4), dim3(8, 8), dim3(1, 64), dim3(5, 7), dim3(4, 4, 4),
                           dim3(3, 5, 7), dim3(1, 1, 64), dim3(64, 16)}) {
    check_block_sum(dim3(2, 3, 2), block);
  }
}

__global__ void barrier_votes_kernel(Buffer<int> out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 50);
  const int all = __syncthreads_and(threadIdx.x < 60);
  store_global(out.data + threadIdx.x, count + 1000 * any + 10000 * all);
}

SIMT_CASE(barriers_that_reduce) {
  Memory<int> out(64);
  launch({1, 64}, barrier_votes_kernel, out.as(Use::kOutput));
  for (size_t i = 0; i < 64; ++i) EXPECT(out[i] == 22 + 1000);
}

__global__ void indices_kernel(Buffer<uint4> out) {
  const unsigned int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  __syncthreads();
  store_global(out.data + block * block_threads() + thread_rank(),
               uint4{block, threadIdx.x, threadIdx.y, threadIdx.z});
}

SIMT_CASE(indices_survive_switches) {
  const dim3 grid(3, 2, 2);
  const dim3 block(5, 3, 2);
  Memory<uint4> out(12 * 30);
  launch({grid, block}, indices_kernel, out.as(Use::kOutput));
  for (unsigned int i = 0; i < out.size(); ++i) {
    const uint4 got = out[i];
    EXPECT(got.x == i / 30 && got.y == i % 5 && got.z == i % 30 / 5 % 3 && got.w == i % 30 / 15);
  }
}

__global__ void atomics_kernel(Buffer<unsigned long long> words) {
  const unsigned long long i = threadIdx.x;
  atomicAdd(words.data, i);
  atomicMax(words.data + 1, i);
  atomicMin(words.data + 2, i + 5);
  atomicOr(words.data + 3, 1ull << i);
  atomicAnd(words.data + 4, ~(1ull << i));
  for (unsigned long long seen = 0;;) {
    const unsigned long long old = atomicCAS(words.data + 5, seen, seen + 2);
    if (old == seen) break;
    seen = old;
  }
  if (i == 63) atomicExch(words.data + 6, 9ull);
}

SIMT_CASE(atomics_of_every_kind) {
  Memory<unsigned long long> words(7, 0);
  words[2] = 100;
  words[4] = ~0ull;
  launch({1, 64}, atomics_kernel, words.as(Use::kPersistent));
  EXPECT(words[0] == 64 * 63 / 2 && words[1] == 63 && words[2] == 5 && words[3] == ~0ull);
  EXPECT(words[4] == 0 && words[5] == 128 && words[6] == 9);
}

}  // namespace
}  // namespace simt_test
